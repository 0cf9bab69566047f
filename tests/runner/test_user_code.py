"""Tasks and metrics of the user: names in files and messages import nothing without consent."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from fedlearn.core.metric import Metric, mean_metric
from fedlearn.core.metrics import combine_evaluations, evaluate, evaluate_client
from fedlearn.core.records import Predictions
from fedlearn.core.tasks import TASKS, Task
from fedlearn.deploy.node_side.gate import allowed_content
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.protocol.messages import RequestKind
from fedlearn.runner.model_folder import read_model_description
from fedlearn.runner.named_settings import resolve_settings
from fedlearn.runner.registry import installed_registry
from fedlearn.runner.user_code import find_metrics, find_task

CODE = """
from fedlearn import Metric, Task, mean_metric
loss = mean_metric("loss", lambda outputs, targets: (outputs[:, 0] - targets) ** 2, higher_is_better=False)
bias = Metric(
    name="bias",
    sums=lambda outputs, targets: {"loss": outputs[:, 0] - targets},
    finish=lambda sums: abs(sums["loss"]) / sums["count"],
    higher_is_better=False,
)
forecast = Task(name="some_code.forecast", metrics=(loss,), main_metric="loss", loss=lambda outputs, y: 0)
renamed = Task(name="forecast", metrics=(loss,), main_metric="loss")
number = 3
"""
HOSTILE = (
    "some_code.forecast",
    "os.system",
    "some_code",
    "",
    "a..b",
    ".a",
    "a.",
    "x" * 500,
    "../x.y",
    "a.b()",
    "a b.c",
    3,
)


@pytest.fixture
def some_code(tmp_path, monkeypatch):
    (tmp_path / "some_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_code", raising=False)
    yield
    sys.modules.pop("some_code", None)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("find", [find_task, lambda name, allow: find_metrics([name], allow)])
def test_a_name_without_consent_imports_nothing(some_code, name, find):
    before = set(sys.modules)
    with pytest.raises(SettingError):
        find(name, ["other"])
    assert set(sys.modules) == before


def test_objects_of_an_allowed_module_are_found(some_code):
    assert find_task("some_code.forecast", ["some_code"]).name == "some_code.forecast"
    assert [metric.name for metric in find_metrics(["some_code.bias"], ["some_code"])] == ["bias"]
    for name in ("some_code.number", "some_code.nothing", "some_code.renamed"):
        with pytest.raises(SettingError):
            find_task(name, ["some_code"])


def test_a_model_file_that_names_a_task_imports_it_only_with_consent(some_code, tmp_path):
    content = {"format": 1, "scenario": "s", "model": "m", "metric": "loss", "num_classes": 1, "layout": []}
    content |= {"has_personal_models": False, "personal_parameters": [], "settings": {}, "client_names": {}}
    (tmp_path / "model").mkdir()
    text = json.dumps({**content, "network": None, "task": "some_code.forecast"})
    (tmp_path / "model" / "model.json").write_text(text)
    with pytest.raises(FedlearnError, match="allow_targets"):
        read_model_description(tmp_path)
    assert "some_code" not in sys.modules
    assert read_model_description(tmp_path, ["some_code"]).task.name == "some_code.forecast"


def clients(task, seed=0):
    rng = np.random.default_rng(seed)
    outputs, targets = (np.repeat(array, 9, axis=0) for array in task.example_arrays(3))
    return [Predictions(client=k, outputs=outputs + rng.normal(size=outputs.shape), targets=targets) for k in range(3)]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_metrics_of_the_user_leave_as_sums_of_their_own(some_code, name):
    """Add a metric whose sum has the name of the loss of the task, and other values."""
    task = TASKS[name]
    flat = Metric(
        name="flat",
        sums=lambda outputs, targets: {"loss": outputs.reshape(len(outputs), -1)[:, 0]},
        finish=lambda sums: sums["loss"] / sums["count"],
    )
    batch = Metric(
        name="batch",
        batch_sums=lambda outputs, targets: {"total": outputs.reshape(len(outputs), -1)[:, :1].sum(axis=0)},
        finish=lambda sums: sums["total"][..., 0] / sums["count"],
    )
    added = task.with_metrics([flat, batch])
    parts = clients(task)
    expected, plain = evaluate(parts, task=added), evaluate(parts, task=task)
    assert expected.pooled.items() >= {key: value for key, value in plain.pooled.items() if value == value}.items()
    found = combine_evaluations([evaluate_client(part, task=added) for part in parts], task=added)
    mean = np.concatenate([part.outputs for part in parts]).reshape(27, -1)[:, 0].mean()
    for metric in ("flat", "batch"):
        assert expected.pooled[metric] == pytest.approx(mean)
        assert found.pooled[metric] == pytest.approx(mean)
        np.testing.assert_array_equal(found.per_client[metric], expected.per_client[metric])


def test_a_metric_with_a_taken_name_or_without_functions_is_refused():
    again = mean_metric("accuracy", lambda outputs, targets: targets)
    with pytest.raises(SettingError, match="another name"):
        TASKS["binary"].with_metrics([again])
    for wrong in ({}, {"sums": len}, {"finish": len}, {"sums": len, "batch_sums": len, "finish": len}):
        with pytest.raises(SettingError, match="expected"):
            Metric(name="wrong", **wrong)
    for name in ("", "a b", "x/y", "x" * 61, "é"):
        with pytest.raises(SettingError, match=r"metric\.name"):
            Metric(name=name, whole=len)


def test_a_node_computes_only_metrics_that_its_operator_has_registered(some_code):
    policy = Policy(scenarios={"heart": {}}, strategies={"fedavg": {}}, builders={"metric": {"bias": "some_code.bias"}})
    order = {"scenario": "heart", "strategy": "fedavg"}
    assert policy.check_settings({**order, "metrics": ["bias"]})["metrics"] == ["some_code.bias"]
    for names in (["ece"], ["os.system"], "bias", [3], [["bias"]], {"bias": 1}, ["bias"] * 21):
        with pytest.raises(PolicyViolation):
            policy.check_settings({**order, "metrics": names})
    assert "some_code" not in sys.modules


def test_a_gate_lets_pass_only_the_metrics_of_its_task(some_code):
    policy = Policy(scenarios={"heart": {}}, strategies={"fedavg": {}})
    task = TASKS["binary"].with_metrics(find_metrics(["some_code.bias"], ["some_code"]))
    arrays = [set(allowed_content(RequestKind.EVALUATE, policy, task=t).arrays) for t in (TASKS["binary"], task)]
    assert arrays[1] - arrays[0] == {"metric/bias", "sum/bias.loss"}


def test_a_submission_names_metrics_of_the_operator(some_code):
    registry = installed_registry().with_builders({"metric": {"bias": "some_code.bias"}})
    assert resolve_settings(registry, {"metrics": ["bias"]})["metrics"] == ["some_code.bias"]
    with pytest.raises(SettingError, match=r"metrics is os\.system"):
        resolve_settings(registry, {"metrics": ["os.system"]})
    assert "some_code" not in sys.modules


def test_a_task_needs_a_loss_and_its_main_metric():
    loss = mean_metric("loss", lambda outputs, targets: targets)
    for metrics, main in (((), "loss"), ((loss,), "rmse"), ((loss, loss), "loss")):
        with pytest.raises(SettingError):
            Task(name="mine", metrics=metrics, main_metric=main)
    with pytest.raises(SettingError, match="a loss for framework=jax"):
        Task(name="mine", metrics=(loss,), main_metric="loss", loss={"torch": len}).loss_for("jax")
