"""The judgement of a final model: its numbers against scikit-learn, and the cases without numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as sk

from fedlearn import Schedule, serial
from fedlearn.core.records import Examples, LocalSettings, ServerState
from fedlearn.data.column_types import Category, Number
from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.inputs import TableInputs
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.errors import SettingError
from fedlearn.loop.scenario import Scenario, judge
from fedlearn.privacy.mechanisms.base import none
from fedlearn.runner.config import Experiment, Plan
from fedlearn.runner.evaluation import evaluate_final_model, write_evaluation
from fedlearn.runner.evaluation.subgroups import divide, require_subgroups
from fedlearn.testing import LinearTrainer
from strategies import fedavg

NUM_FEATURES = 3
COLUMNS = (Number(name="age", centre=50.0, spread=10.0), Category(name="sex", levels=("f", "m")))
TARGETS = {
    "binary": Target(name="relapse", task="binary", classes=("no", "yes")),
    "multiclass": Target(name="stage", task="multiclass", classes=("I", "II", "III")),
    "regression": Target(name="days", task="regression", centre=20.0, spread=5.0, unit="days"),
}


class Model(LinearTrainer):
    """Linear scores; ``multiclass`` has one row of weights for each class."""

    def __init__(self, num_outputs=1):
        super().__init__(NUM_FEATURES * num_outputs)
        self.num_outputs = num_outputs

    def predict(self, params_D, x):
        return np.asarray(x @ np.asarray(params_D).reshape(self.num_outputs, NUM_FEATURES).T, np.float32)


def experiment(task="binary", num_clients=4, size=60, subgroups=(), **scenario):
    rng = np.random.default_rng(0)
    count = num_clients * size
    is_male = rng.random(count) < 0.5
    x = np.stack([rng.normal(size=count), ~is_male, is_male], axis=1).astype(np.float32)
    noisy = x[:, 0] + rng.normal(size=count)
    y = {"binary": noisy > 1, "multiclass": np.digitize(noisy, [-0.5, 0.8]), "regression": noisy}[task]
    y = y.astype(np.float32 if task == "regression" else np.int64)
    rows = np.split(np.arange(count), num_clients)
    data = from_arrays(x, y, assignment=rows, task=task, test_share=0.5, seed=1)
    trainer = Model(3 if task == "multiclass" else 1)
    preprocessing = Preprocessing(inputs=TableInputs(columns=COLUMNS), target=TARGETS[task])
    fields = {"name": "x", "data": data, "trainer": trainer, "preprocessing": preprocessing} | scenario
    plan = Plan(
        strategy=fedavg(), schedule=Schedule(rounds=5), local=LocalSettings(), privacy=none(), seed=1,
        subgroups=subgroups,
    )  # fmt: skip
    return Experiment(plan=plan, scenario=Scenario(**fields), engine=serial(fields["data"], trainer))


def state_of(given):
    weights = {1: [1.0, -0.3, -0.2], 3: [-1, 0.1, 0.2, 0.1, 0.3, 0.2, 1, -0.4, 0.1]}
    params = np.array(weights[given.scenario.trainer.num_outputs], np.float32)
    return ServerState(round=5, seed=1, params_D=params)


def judged(*args, **kwargs):
    given = experiment(*args, **kwargs)
    return given, evaluate_final_model(given, state_of(given))


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


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_values_equal_the_last_evaluation_and_lie_in_their_intervals(task):
    given, evaluation = judged(task, num_clients=12)
    parts = list(given.engine.evaluate(state_of(given).params_D, given.scenario.data.clients))
    expected = judge(given.scenario)(state_of(given).params_D, parts)
    for name, entry in evaluation["metrics"].items():
        assert name not in expected.pooled or entry["value"] == pytest.approx(expected.pooled[name], rel=1e-6)
        assert entry["low"] is None or entry["low"] <= entry["value"] <= entry["high"], name
    assert "over clients" in evaluation["intervals"]


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
    columns = {"region": lambda client: cells[client]}
    given = experiment(subgroups=("region",), held_out_columns=columns)
    common, rare = evaluate_final_model(given, state_of(given))["subgroups"][0]["groups"]
    assert rare == {"name": "rare", "num_examples": None, "suppressed": True}
    assert common["num_examples"] == 111


def test_an_unknown_column_of_groups_is_refused():
    with pytest.raises(SettingError, match=r"subgroups.*Sex[\s\S]*age, sex[\s\S]*subgroups=\[age\]"):
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
