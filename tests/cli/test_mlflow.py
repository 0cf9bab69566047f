"""The callback for MLflow logs each round once, continues a resumed run, groups a sweep, and endangers no run.

The quick tests use a client in memory with the methods of MLflow's client; the slow ones use MLflow itself.
"""

from __future__ import annotations

import json
import socket
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from fedlearn.callbacks import mlflow as module
from fedlearn.errors import SettingError
from fedlearn.runner.start import main
from simulations.resume import main as resume

WORDS = ["scenario=diabetes", "callbacks=[mlflow]", "report=false"]


class Failure(Exception):
    """Replace ``MlflowException``, for a name that exists already."""

    error_code = "RESOURCE_ALREADY_EXISTS"


class Client:
    """Keep runs in memory. ``fails`` has the names of methods that raise an error."""

    runs: ClassVar = {}
    experiments: ClassVar = {}
    versions: ClassVar = []
    fails = ()
    calls: ClassVar = []

    def __init__(self, tracking_uri):
        self.uri = tracking_uri

    def __getattribute__(self, name):
        if name in type(self).fails:
            type(self).calls.append(name)
            raise ConnectionError("no tracking server")
        return super().__getattribute__(name)

    def get_experiment_by_name(self, name):
        found = self.experiments.get(name)
        return found and SimpleNamespace(experiment_id=found)

    def create_experiment(self, name, artifact_location=None):
        self.experiments[name] = str(len(self.experiments) + 1)
        return self.experiments[name]

    def create_run(self, experiment, run_name, tags=None):
        run = SimpleNamespace(
            name=run_name, tags=dict(tags or {}), params={}, metrics=[], files=[], status="RUNNING", uri=self.uri
        )
        self.runs[f"id{len(self.runs)}"] = run
        return SimpleNamespace(info=SimpleNamespace(run_id=f"id{len(self.runs) - 1}"))

    def get_run(self, run_id):
        run = self.runs[run_id]
        metrics = {name: value for name, value, _ in run.metrics}
        return SimpleNamespace(data=SimpleNamespace(metrics=metrics, params=run.params))

    def update_run(self, run_id, status):
        self.runs[run_id].status = status

    def set_terminated(self, run_id, status):
        self.runs[run_id].status = status

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        run = self.runs[run_id]
        run.metrics += [(metric.key, metric.value, metric.step) for metric in metrics]
        run.params |= {param.key: param.value for param in params}
        run.tags |= {tag.key: tag.value for tag in tags}

    def log_artifact(self, run_id, path):
        self.runs[run_id].files.append(path.rpartition("/")[2])

    def log_artifacts(self, run_id, path, artifact_path):
        self.runs[run_id].files.append(artifact_path)

    def log_dict(self, run_id, content, path):
        self.runs[run_id].files.append(path)

    def create_registered_model(self, name):
        if name in dict(self.versions):
            raise Failure(name)

    def create_model_version(self, name, source, run_id):
        self.versions.append((name, source))


def entity(*names):
    return lambda *values: SimpleNamespace(**dict(zip(names, values, strict=True)))


@pytest.fixture
def client(monkeypatch):
    pytest.importorskip("torch")
    parts = {
        "mlflow": {"MlflowClient": Client},
        "mlflow.entities": {
            "Metric": entity("key", "value", "timestamp", "step"),
            "Param": entity("key", "value"),
            "RunTag": entity("key", "value"),
        },
        "mlflow.exceptions": {"MlflowException": Failure},
    }
    for name, content in parts.items():
        fake = ModuleType(name)
        vars(fake).update(content)
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    for name, value in {"runs": {}, "experiments": {}, "versions": [], "fails": (), "calls": []}.items():
        monkeypatch.setattr(Client, name, value)
    for variable in (module.URI_VARIABLE, module.EXPERIMENT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    return Client


def steps(run, name):
    return [step for found, _, step in run.metrics if found == name]


def test_a_resumed_run_continues_its_run_and_logs_each_round_once(client, here):
    words = [*WORDS, "hydra.run.dir=run", "callbacks.mlflow.registered_model=risk", "strategy=fedprox"]
    assert main([*words, "rounds=2"]) == 0
    (run,) = client.runs.values()
    assert run.uri == f"sqlite:///{here}/mlflow.db"
    assert (run.status, run.name) == ("FINISHED", "diabetes fedprox")
    typed = ("strategy", "strategy.mu", "local.learning_rate", "rounds", "init")
    assert [run.params[name] for name in typed] == ["fedprox", "0.1", "0.1", "2", "null"]
    assert not any(name.startswith(("callbacks", "hydra", "scenario.seed")) for name in run.params)
    assert {"model_card.md", "model/model", "model/MLmodel"} - set(run.files) == {"model_card.md"}  # report=false
    assert steps(run, "final/rmse/low") == [2]
    # a killed run has logged a round whose checkpoint is missing; the tracker lacks another one
    (here / "run" / "checkpoints" / "round_000002.safetensors").unlink()
    run.metrics = [value for value in run.metrics if value[2] != 1]
    assert resume(["run", "rounds=3"]) == 0
    assert list(client.runs.values()) == [run]
    assert steps(run, "test/loss") == [2, 3]
    assert (run.status, run.tags["fedlearn.resumed.rounds"]) == ("FINISHED", "3")
    assert client.versions == [("risk", "runs:/id0/model")] * 2


@pytest.mark.slow
def test_a_resume_logs_the_rounds_that_a_tracker_lacks(client, here, capsys):
    client.fails = ("log_batch",)
    assert main([*WORDS, "hydra.run.dir=run", "rounds=2"]) == 0
    assert capsys.readouterr().err.count("mlflow failed") == 1
    (run,) = client.runs.values()
    assert run.status == "FAILED"
    client.fails = ()
    assert resume(["run", "rounds=3"]) == 0
    (run,) = client.runs.values()
    assert (steps(run, "test/loss"), run.status) == ([1, 2, 3], "FINISHED")
    assert run.tags["fedlearn.resumed.strategy"] == "fedavg"  # settings that the first part could not log


METHODS = ("create_experiment", "create_run", "log_batch", "set_terminated", "log_artifacts")


@pytest.mark.parametrize("method", [METHODS[1], *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS)])
def test_a_tracker_that_fails_warns_once_and_changes_nothing(client, here, capsys, summary, method):
    assert main(["scenario=diabetes", "report=false", "rounds=2", "hydra.run.dir=plain"]) == 0
    client.fails = (method,)
    assert main([*WORDS, "rounds=2", "hydra.run.dir=run"]) == 0
    assert capsys.readouterr().err.count("failed") == 1
    assert client.calls
    plain, run = summary(here / "plain"), summary(here / "run")
    (failure,) = run.pop("callback_failures")
    assert failure["error"] == "ConnectionError: no tracking server"
    differ = {name for name in run if run[name] != plain[name]}
    assert differ <= {"seconds"}


@pytest.mark.slow
def test_the_jobs_of_a_sweep_have_one_parent_with_the_settings_as_names(client, here):
    assert main([*WORDS, "rounds=1", "-m", "seed=1,2", "num_jobs=1"]) == 0
    parent, *jobs = client.runs.values()
    assert [job.name for job in jobs] == ["0_seed=1", "1_seed=2"]
    assert {job.tags["mlflow.parentRunId"] for job in jobs} == {"id0"}
    (folder,) = (here / "multirun").iterdir()
    assert (parent.name, parent.status) == (folder.name, "FINISHED")
    assert resume([str(folder / "1_seed=2"), "rounds=2"]) == 0
    assert len(client.runs) == 3


@pytest.mark.slow
def test_a_run_with_a_privacy_guarantee_sends_its_metrics_only(client, here, capsys):
    words = [*WORDS, "rounds=1", "privacy=central", "privacy.noise_multiplier=1", "strategy.weighting=equal"]
    words = [word for word in words if word != "report=false"]
    assert main([*words, "hydra.run.dir=run"]) == 0
    (run,) = client.runs.values()
    line = json.loads((here / "run" / "metrics.jsonl").read_text())
    assert run.files == []
    assert {name for name, _, _ in run.metrics} == set(module.numbers(line))
    assert not any(name.startswith("final/") for name, _, _ in run.metrics)
    assert main([*words, "hydra.run.dir=other", "callbacks.mlflow.registered_model=risk"]) == 0
    assert "callbacks.mlflow.artifacts=true" in capsys.readouterr().err
    assert client.versions == []
    assert main([*words, "hydra.run.dir=third", "callbacks.mlflow.artifacts=true"]) == 0
    assert "report.html" in list(client.runs.values())[-1].files


WRONG = {
    "a name, or null": [{"experiment": " "}, {"registered_model": 3}],
    "true, false or null": [{"artifacts": "some"}],
    "true or null": [{"artifacts": False, "registered_model": "risk"}],
    "an address without a password": [
        {"tracking_uri": "http://me:secret@host"},
        {"tracking_uri": "mysql://a:secret@b"},
    ],
}


def test_wrong_settings_and_a_missing_extra_are_refused_before_the_run(client, here, capsys, monkeypatch):
    for expected, cases in WRONG.items():
        for settings in cases:
            with pytest.raises(SettingError, match=expected) as refused:
                module.MLflow(**settings)
            assert "secret" not in str(refused.value)
    assert main([*WORDS, "callbacks.mlflow.artifacts=some"]) == 2
    assert "try       callbacks.mlflow.artifacts=true" in capsys.readouterr().err
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert main(WORDS) == 2
    assert "pip install 'fedlearn[mlflow]'" in capsys.readouterr().err
    assert not any(here.iterdir())


@pytest.mark.slow
def test_a_password_of_the_environment_stays_out_of_the_run_folder(client, here, monkeypatch):
    monkeypatch.setenv(module.URI_VARIABLE, "http://me:secret@host")
    assert main([*WORDS, "rounds=1", "hydra.run.dir=run"]) == 0
    (run,) = client.runs.values()
    assert run.uri == "http://me:secret@host"
    assert not any(b"secret" in path.read_bytes() for path in (here / "run").rglob("*") if path.is_file())


@pytest.mark.slow
def test_mlflow_itself_has_the_run_and_loads_the_registered_model(here, monkeypatch):
    tracker = pytest.importorskip("mlflow")
    pd = pytest.importorskip("pandas")
    import fedlearn

    for variable in (module.URI_VARIABLE, module.EXPERIMENT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    words = ["scenario=diabetes", "callbacks=[mlflow]", "callbacks.mlflow.registered_model=risk"]
    assert main([*words, "rounds=2", "hydra.run.dir=run"]) == 0
    assert resume(["run", "rounds=3"]) == 0
    assert main([*words, "rounds=1", "-m", "seed=1,2", "num_jobs=1"]) == 0
    uri = f"sqlite:///{here}/mlflow.db"
    client = tracker.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("fedlearn")
    assert not (here / "run" / "summary.json").read_text().count("callback_failures")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs)[:2] == ["0_seed=1", "1_seed=2"]
    (run,) = [run for run in runs if run.info.run_name == "diabetes fedavg"]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "test/rmse")] == [1, 2, 3]
    assert {"report.html", "model_card.md", "model", "figures"} <= {
        item.path for item in client.list_artifacts(run.info.run_id)
    }
    tracker.set_tracking_uri(uri)
    names = ["age", "sex", "bmi", "bp", *(f"s{number}" for number in range(1, 7))]
    frame = pd.DataFrame({name: [0.1, 0.2] for name in names})
    loaded = tracker.pyfunc.load_model("models:/risk/2")
    assert np.array_equal(loaded.predict(frame), fedlearn.load("run").predict(frame))


@pytest.mark.slow
def test_a_server_that_is_silent_delays_a_run_only_once(here, monkeypatch, capsys, summary):
    pytest.importorskip("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and never responds
        monkeypatch.setenv(module.URI_VARIABLE, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        assert main([*WORDS, "rounds=2", "hydra.run.dir=run"]) == 0
    assert capsys.readouterr().err.count("mlflow failed") == 1
    (failure,) = summary(here / "run")["callback_failures"]
    assert failure["method"] == "on_start"
