"""Warnings on models that are of no use."""

import numpy as np
import pytest

from fedlearn.callbacks.judgement import last_confusion, result_warnings
from fedlearn.callbacks.run_history import history_entry
from fedlearn.core.metrics import evaluate
from fedlearn.core.records import Predictions, Round


def line(number, outputs, targets, task="binary"):
    part = Predictions(client=0, outputs=np.asarray(outputs, np.float32), targets=np.asarray(targets))
    evaluation = evaluate([part], task=task)
    state = type("State", (), {"round": number})()
    return history_entry(Round(state=state, cohort=(0,), evaluation=evaluation))


def test_a_model_that_predicts_one_class_is_named():
    history = [line(1, [[-1.0]] * 8, [0] * 7 + [1])]
    assert result_warnings(history) == ["the model predicts class 0 for all held-out examples; accuracy is 87.5 %"]
    assert last_confusion(history).tolist() == [[7, 0], [1, 0]]
    (warning,) = result_warnings(history, ("no", "yes"))
    assert "class no" in warning


def test_a_class_that_the_model_overlooks_is_named():
    outputs = [[-1.0]] * 109 + [[1.0]]
    targets = [0] * 95 + [1] * 15
    (warning,) = result_warnings([line(1, outputs, targets)], ("no", "yes"))
    assert warning == "the model finds few held-out examples of some classes: 1 of 15 of class yes"


def test_an_accuracy_below_the_share_of_the_largest_class_is_named():
    (warning,) = result_warnings([line(1, [[1.0], [1.0], [-1.0], [-1.0]], [0, 0, 0, 1])])
    assert warning == "accuracy 25.0 % is not above 75.0 %, the share of the largest class"


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_a_useful_model_has_no_warning(task):
    outputs = [[-1.0], [1.0], [1.0]] if task == "binary" else np.eye(3)
    assert result_warnings([line(1, outputs, [0, 1, 1] if task == "binary" else [0, 1, 2], task)]) == []


def test_a_loss_that_grows_or_is_not_finite_is_named():
    history = [line(1, [[1.0], [2.0]], [1.0, 3.0], "regression"), line(2, [[1e8], [2.0]], [1.0, 3.0], "regression")]
    warnings = result_warnings(history)
    assert "the loss grew from 0.5 after round 1 to 5e+15" in warnings[0]
    assert "the mean of the targets is a better prediction" in warnings[1]
    assert "not finite after round 3" in result_warnings([*history, line(3, [[np.nan], [1.0]], [1, 0])])[0]


def test_one_class_among_the_targets_or_no_evaluation_gives_no_warning():
    assert result_warnings([line(1, [[-1.0]] * 3, [0] * 3)]) == []
    assert result_warnings([]) == []
