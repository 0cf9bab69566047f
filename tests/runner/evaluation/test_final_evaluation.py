"""The judgement of a final model: its numbers against scikit-learn, and the cases without numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from judged import experiment, judged, state_of
from sklearn import metrics as sk

from fedlearn.core.intervals import wilson_interval
from fedlearn.core.metric import mean_metric
from fedlearn.core.metrics import evaluate
from fedlearn.core.records import Examples, Predictions, ServerState
from fedlearn.core.tasks import TASKS
from fedlearn.data.held_out_columns import HeldOutColumns
from fedlearn.errors import SettingError
from fedlearn.loop.scenario import judge
from fedlearn.runner.evaluation import evaluate_final_model, write_evaluation
from fedlearn.runner.evaluation.subgroups import divide, require_subgroups


def pooled(given):
    parts = [given.scenario.data.test(client) for client in given.scenario.data.clients]
    x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    return given.scenario.trainer.predict(state_of(given).params_D, x).astype(np.float64), y


def test_the_numbers_of_a_binary_model_equal_scikit_learn():
    given, evaluation = judged("binary")
    outputs, y = pooled(given)
    chance, predicted = 1 / (1 + np.exp(-outputs[:, 0])), outputs[:, 0] > 0
    values = {name: entry["value"] for name, entry in evaluation["metrics"].items()}
    assert values == pytest.approx({
        "loss": sk.log_loss(y, chance), "accuracy": sk.accuracy_score(y, predicted),
        "brier": sk.brier_score_loss(y, chance), "ece": values["ece"],
        "precision": sk.precision_score(y, predicted), "recall": sk.recall_score(y, predicted),
        "f1": sk.f1_score(y, predicted), "balanced_accuracy": sk.balanced_accuracy_score(y, predicted),
        "auc": sk.roc_auc_score(y, chance), "auprc": sk.average_precision_score(y, chance),
    })  # fmt: skip
    assert evaluation["confusion"] == sk.confusion_matrix(y, predicted).tolist()
    clinical = evaluation["clinical"]
    assert clinical["positive_class"] == "yes"
    assert clinical["specificity"]["value"] == pytest.approx(sk.recall_score(y, predicted, pos_label=0))
    assert clinical["npv"]["value"] == pytest.approx(sk.precision_score(y, predicted, pos_label=0))
    (curve,) = evaluation["curves"]
    assert (curve["class"], curve["auc"]) == ("yes", pytest.approx(values["auc"]))
    share = max(np.mean(y), 1 - np.mean(y))
    assert evaluation["constant"] == {
        "prediction": "no",
        "metrics": pytest.approx({"accuracy": share, "balanced_accuracy": 0.5, "auc": 0.5, "auprc": np.mean(y)}),
    }


def test_the_numbers_of_a_model_of_classes_equal_scikit_learn():
    given, evaluation = judged("multiclass")
    outputs, y = pooled(given)
    chance = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    predicted, values = outputs.argmax(axis=1), {name: e["value"] for name, e in evaluation["metrics"].items()}
    assert values["auc"] == pytest.approx(sk.roc_auc_score(y, chance, multi_class="ovr"))
    assert values["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, predicted))
    assert values["f1"] == pytest.approx(sk.f1_score(y, predicted, average="macro"))
    assert [curve["class"] for curve in evaluation["curves"]] == ["I", "II", "III"]
    for label, curve in enumerate(evaluation["curves"]):
        assert curve["auc"] == pytest.approx(sk.roc_auc_score(y == label, chance[:, label]))
    recalls = [entry["recall"]["value"] for entry in evaluation["classes"]]
    assert recalls == pytest.approx(sk.recall_score(y, predicted, average=None).tolist())
    assert "clinical" not in evaluation


def test_the_numbers_of_a_regression_equal_scikit_learn_in_the_unit_of_the_target():
    given, evaluation = judged("regression")
    outputs, y = pooled(given)
    truth, predicted = 20 + 5 * y.astype(np.float64), 20 + 5 * outputs[:, 0]
    values = {name: entry["value"] for name, entry in evaluation["metrics"].items()}
    assert values == pytest.approx({
        "loss": sk.mean_squared_error(y, outputs[:, 0]), "rmse": sk.root_mean_squared_error(truth, predicted),
        "mae": sk.mean_absolute_error(truth, predicted), "r2": sk.r2_score(truth, predicted),
    })  # fmt: skip
    assert evaluation["constant"]["metrics"]["rmse"] == pytest.approx(truth.std())
    residuals = evaluation["residuals"]
    assert sum(residuals["counts"]) == np.sum(residuals["pair_counts"]) == len(y)
    assert residuals["quantiles"]["0.5"] == pytest.approx(np.median(predicted - truth))


def test_a_metric_of_the_user_has_an_interval():
    given = experiment(num_clients=12)
    gap = mean_metric("gap", lambda outputs, targets: abs(outputs[:, 0] - targets), higher_is_better=False)
    data = replace(given.scenario.data, task=TASKS["binary"].with_metrics([gap]))
    given = replace(given, scenario=replace(given.scenario, data=data))
    entry = evaluate_final_model(given, state_of(given))["metrics"]["gap"]
    outputs, y = pooled(given)
    assert entry["value"] == pytest.approx(np.mean(abs(outputs[:, 0] - y)))
    assert entry["low"] < entry["value"] < entry["high"]


@pytest.mark.parametrize("name", ["ranking", "multilabel", "survival"])
def test_each_other_task_has_the_values_of_its_last_evaluation(name):
    given, rng = experiment(num_clients=12), np.random.default_rng(5)
    task, size = TASKS[name], 20
    outputs, y = {
        "ranking": (rng.normal(size=(12, size, 1)), np.eye(size, dtype=int)[rng.integers(0, size, 12)]),
        "multilabel": (rng.normal(size=(12, size, 3)), rng.integers(0, 2, (12, size, 3))),
        "survival": (
            rng.normal(size=(12, size, 1)),
            np.stack([rng.random((12, size)), rng.integers(0, 2, (12, size))], 2),
        ),
    }[name]
    x = np.arange(12 * size, dtype=np.float32).reshape(12, size, 1)
    every = outputs.reshape(-1, *outputs.shape[2:])

    class Fixed(type(given.scenario.trainer)):
        def predict(self, params_D, x):
            return every[x[:, 0].astype(int)]

    data = replace(
        given.scenario.data, task=task, num_classes=task.count_classes(y.reshape(-1, *y.shape[2:])),
        train=lambda client: Examples(x[client], y[client]), test=lambda client: Examples(x[client], y[client]),
    )  # fmt: skip
    scenario = replace(given.scenario, data=data, trainer=Fixed(), preprocessing=None)
    evaluation = evaluate_final_model(replace(given, scenario=scenario), state_of(given))
    expected = evaluate([Predictions(client=k, outputs=outputs[k], targets=y[k]) for k in range(12)], task=task).pooled
    for metric, value in expected.items():
        entry = evaluation["metrics"][metric]
        assert entry["value"] is None if np.isnan(value) else entry["value"] == pytest.approx(value), metric
        assert entry["low"] is None or entry["low"] <= entry["value"] <= entry["high"]
    assert any(entry["low"] is not None for entry in evaluation["metrics"].values())


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_values_equal_the_last_evaluation_and_lie_in_their_intervals(task):
    given, evaluation = judged(task, num_clients=12)
    parts = list(given.engine.evaluate(state_of(given).params_D, given.scenario.data.clients))
    expected = judge(given.scenario)(state_of(given).params_D, parts)
    for name, entry in evaluation["metrics"].items():
        assert name not in expected.pooled or entry["value"] == pytest.approx(expected.pooled[name], rel=1e-6)
        assert entry["low"] is None or entry["low"] <= entry["value"] <= entry["high"], name
    assert "over clients" in evaluation["intervals"]


def test_a_model_without_an_error_has_no_interval_of_width_zero():
    first = experiment()
    perfect = replace(first.scenario.data, test=lambda client: with_targets_of_the_model(first, client))
    given = replace(first, scenario=replace(first.scenario, data=perfect))
    metrics = evaluate_final_model(given, state_of(given))["metrics"]
    count = sum(len(perfect.test(client)) for client in perfect.clients)
    assert (metrics["accuracy"]["low"], metrics["accuracy"]["high"]) == pytest.approx(wilson_interval(count, count))
    assert metrics["recall"] == {"value": 1.0, "low": None, "high": None}


def with_targets_of_the_model(given, client):
    x = given.scenario.data.test(client).x
    return Examples(x, (given.scenario.trainer.predict(state_of(given).params_D, x)[:, 0] > 0).astype(int))


def test_two_calls_give_the_same_file(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        given = experiment(subgroups=("sex",))
        write_evaluation(tmp_path / name, given, state_of(given))
    assert (tmp_path / "a/evaluation.json").read_bytes() == (tmp_path / "b/evaluation.json").read_bytes()


def test_importance_ranks_the_column_that_the_model_uses():
    given = experiment()
    params = np.array([3.0, 0, 0], np.float32)
    importance = evaluate_final_model(given, ServerState(round=1, seed=1, params_D=params))["importance"]
    first, second = importance["columns"]
    assert (first["name"], second["name"], second["mean"]) == ("age", "sex", 0.0)
    assert first["mean"] > 0.05


def test_importance_equals_scikit_learn_within_its_error():
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.inspection import permutation_importance

    given, evaluation = judged()

    class Estimator(ClassifierMixin, BaseEstimator):
        classes_ = np.array([0, 1])

        def fit(self, x, y):
            return self

        def predict(self, x):
            return (given.scenario.trainer.predict(state_of(given).params_D, x)[:, 0] > 0).astype(int)

    parts = [given.scenario.data.test(client) for client in given.scenario.data.clients]
    x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    expected = permutation_importance(Estimator(), x, y, n_repeats=50, random_state=0)
    columns = {column["name"]: column for column in evaluation["importance"]["columns"]}
    assert columns["age"]["mean"] == pytest.approx(expected.importances_mean[0], abs=0.05)


def test_small_groups_have_no_value():
    given = experiment(subgroups=("sex", "age"))
    by_sex, by_age = evaluate_final_model(given, state_of(given))["subgroups"]
    assert [group["name"] for group in by_sex["groups"]] == ["f", "m"]
    outputs, y = pooled(given)
    x = np.concatenate([given.scenario.data.test(client).x for client in given.scenario.data.clients])
    is_female = x[:, 1] == 1
    expected = np.mean((outputs[is_female, 0] > 0) == y[is_female])
    assert by_sex["groups"][0]["value"] == pytest.approx(expected)
    assert by_sex["groups"][0]["num_examples"] == is_female.sum()
    assert len(by_age["groups"]) == 4
    cells = {client: np.full(30, "common", object) for client in range(4)}
    cells[2][:9] = "rare"
    columns = HeldOutColumns(names=("region",), read=lambda name: cells)
    given = experiment(subgroups=("region",), held_out_columns=columns)
    common, rare = evaluate_final_model(given, state_of(given))["subgroups"][0]["groups"]
    assert rare == {"name": "rare", "num_examples": None, "suppressed": True}
    assert common["num_examples"] == 111


def test_an_unknown_column_of_groups_is_refused():
    with pytest.raises(SettingError, match=r"subgroups.*Sex[\s\S]*age, sex[\s\S]*subgroups=\['age'\]"):
        require_subgroups(experiment().scenario, ["Sex"])
    require_subgroups(experiment().scenario, ["sex", "age"])


def test_numbers_with_many_values_become_ranges_and_missing_cells_a_group():
    index, labels = divide(np.array([*np.arange(40.0), np.nan]))
    assert labels == ["up to 9.75", "9.75 to 19.5", "19.5 to 29.25", "above 29.25", "missing"]
    assert np.bincount(index).tolist() == [10, 10, 10, 10, 1]
    index, labels = divide(np.array([f"{k}" for k in range(30)] + ["x"] * 5, object))
    assert len(labels) == 13
    assert labels[-1] == "other"
    assert np.bincount(index)[labels.index("x")] == 5


def reason(given, **state):
    return evaluate_final_model(given, replace(state_of(given), **state))["missing"]


def test_a_missing_judgement_has_a_reason():
    given = experiment()
    data = given.scenario.data
    at_nodes = replace(data, num_train=dict.fromkeys(data.clients, 30))
    assert "stay at the nodes" in reason(replace(given, scenario=replace(given.scenario, data=at_nodes)))
    empty = replace(data, test=lambda client: Examples(np.zeros((0, 3), np.float32), np.zeros(0)))
    assert "no held-out examples" in reason(replace(given, scenario=replace(given.scenario, data=empty)))
    assert "not finite" in reason(given, params_D=np.full(3, np.nan, np.float32))


def test_counts_of_nodes_give_clinical_figures_but_no_curves():
    given = experiment()
    data = replace(given.scenario.data, num_train=dict.fromkeys(given.scenario.data.clients, 30))
    given = replace(given, scenario=replace(given.scenario, data=data))
    confusion = np.array([[50.0, 10.0], [5.0, 35.0]])
    evaluation = evaluate_final_model(given, state_of(given), confusion_CC=confusion)
    assert "stay at the nodes" in evaluation["missing"]
    assert evaluation["clinical"]["sensitivity"]["value"] == 35 / 40
    assert evaluation["metrics"]["accuracy"]["value"] == 0.85
    assert evaluation["constant"] == {
        "prediction": "no", "metrics": {"accuracy": 0.6, "balanced_accuracy": 0.5, "auc": 0.5, "auprc": 0.4}
    }  # fmt: skip
    assert [site["num_train"] for site in evaluation["sites"]] == [30] * 4
    assert not {"curves", "calibration", "subgroups", "importance"} & set(evaluation)
    for hostile in (0 * confusion, -confusion, np.full((2, 2), np.nan), np.full((2, 2), 1e300)):
        json.dumps(evaluate_final_model(given, state_of(given), confusion_CC=hostile), allow_nan=False)


def test_an_error_of_the_judgement_does_not_end_the_run(tmp_path, capsys):
    given = experiment()
    broken = replace(given, scenario=replace(given.scenario, preprocessing="broken"))
    write_evaluation(tmp_path, broken, state_of(given))
    assert "no evaluation.json: AttributeError" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_extreme_outputs_and_a_single_class_give_strict_json(task):
    given = experiment(task)
    huge = ServerState(round=1, seed=1, params_D=state_of(given).params_D * np.float32(1e30))
    json.dumps(evaluate_final_model(given, huge), allow_nan=False)
    data = given.scenario.data
    same = replace(data, test=lambda client: replace_targets(data.test(client)))
    json.dumps(evaluate_final_model(replace(given, scenario=replace(given.scenario, data=same)), huge), allow_nan=False)


def replace_targets(part):
    return type(part)(part.x, np.zeros_like(part.y))
