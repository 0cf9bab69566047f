import numpy as np
import pytest

from fedlearn import LocalSettings, SettingError
from fedlearn.core import Evaluation, Failure
from fedlearn.core.records import FailureStage


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0), ("epochs", 1.5), ("epochs", "two"), ("steps", 0), ("batch_size", 0), ("batch_size", True),
        ("optimizer", 3), ("learning_rate", -1), ("learning_rate", float("nan")), ("learning_rate", "fast"),
        ("momentum", 1.0), ("weight_decay", -0.1), ("learning_rate", float("inf")),
        ("max_grad_norm", 0), ("max_grad_norm", "1"), ("micro_batch_size", 0), ("label_smoothing", 1.0),
        ("class_weights", "equal"), ("class_weights", [1]), ("class_weights", [1, -1]), ("class_weights", [0, 0]),
    ],
)  # fmt: skip
def test_local_settings_out_of_range_are_refused_by_name(setting, value):
    with pytest.raises(SettingError) as caught:
        LocalSettings(**{setting: value})
    assert caught.value.setting == setting
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{setting} is {value}"
    assert lines[1].split()[0] == "expected"
    assert lines[2].split()[0] == "try"


def test_passes_beside_a_number_of_steps_are_not_ignored_in_silence():
    with pytest.raises(SettingError, match=r"epochs is 3\n  expected  1, because steps=20 is set") as caught:
        LocalSettings(epochs=3, steps=20)
    assert caught.value.setting == "epochs"


@pytest.mark.parametrize(
    ("optimizer", "setting"),
    [
        ({"betas": [0.9, 0.9]}, "optimizer"), ({"name": "adam", "beta": 1}, "optimizer.beta"),
        ({"name": "adam", "betas": [0.9]}, "optimizer.betas"), ({"name": "adam", "eps": 0}, "optimizer.eps"),
        ({"name": "rmsprop", "alpha": 1}, "optimizer.alpha"), ({"name": "sgd", "nesterov": 1}, "optimizer.nesterov"),
        ({"name": "sgd", "nesterov": True}, "momentum"),
        ({"name": "adam", "_target_": "os.system"}, "optimizer._target_"),
    ],
)  # fmt: skip
def test_values_of_an_optimizer_out_of_range_are_refused_by_name(optimizer, setting):
    with pytest.raises(SettingError) as caught:
        LocalSettings(optimizer=optimizer)
    assert caught.value.setting == setting


def test_momentum_without_effect_is_refused():
    with pytest.raises(SettingError, match=r"momentum is 0\.9\n  expected  0, because adam has no setting momentum"):
        LocalSettings(optimizer="adam", momentum=0.9)


def evaluation(values):
    values_K = np.array(values, float)
    return Evaluation(
        pooled={}, clients=tuple(range(len(values))), num_examples_K=np.ones(len(values)), per_client={"m": values_K}
    )


def test_clients_where_a_metric_is_undefined_are_left_out_of_the_summary():
    item = evaluation([0.5, np.nan, 1.0])
    assert item.mean("m") == 0.75
    assert item.std("m") == 0.25
    assert np.isnan(evaluation([np.nan]).mean("m"))
    assert np.isnan(evaluation([np.nan]).worst("m", higher_is_better=True))


def test_the_worst_tenth_is_the_low_end_of_a_score_and_the_high_end_of_an_error():
    item = evaluation(np.arange(20) / 20)
    assert item.worst("m", higher_is_better=True) == pytest.approx(0.025)
    assert item.worst("m", higher_is_better=False) == pytest.approx(0.925)
    assert evaluation([0.3, 0.9]).worst("m", higher_is_better=True) == 0.3


def test_a_failure_takes_a_stage_or_its_value_and_no_other_name():
    assert Failure(client=1, stage="fit", reason="x").stage is FailureStage.FIT
    with pytest.raises(ValueError, match="spare"):
        Failure(client=1, stage="spare", reason="x")


def test_a_node_cannot_name_a_stage_that_does_not_count_as_a_failure():
    assert not any(stage.may_be_named_by_node for stage in FailureStage if not stage.counts_as_failure)
    assert [stage for stage in FailureStage if not stage.counts_as_failure] == [FailureStage.NOT_NEEDED]
    assert all(stage.is_before_sending for stage in FailureStage if stage.may_be_named_by_node)
    assert {stage for stage in FailureStage if stage.is_before_sending and not stage.may_be_named_by_node} == {
        FailureStage.SECAGG_ADVERTISE,
        FailureStage.SECAGG_SHARE,
    }
