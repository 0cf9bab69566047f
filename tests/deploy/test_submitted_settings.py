"""A submitter starts runs at the coordinator, without access to its shell, files or environment."""

from __future__ import annotations

import json
import shlex
import sys
from copy import deepcopy

import pytest
from omegaconf import OmegaConf

from fedlearn.deploy.coordinator import BUILDERS_ENV
from fedlearn.deploy.coordinator_side.submitted_settings import check_submitted_settings, read_submitted_settings
from fedlearn.deploy.submit import compose_job, compose_request
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.runner.named_settings import name_settings
from fedlearn.runner.registry import installed_registry
from fedlearn.runner.run_config import config_to_dict

SHELL = {"_target_": "simulations.run.main", "argv": ["strategy._target_=os.system", "allow_targets=[os]"]}
FILE = {"_target_": "fedlearn.core.checkpoint.write_atomically", "path": "x", "content": "y"}
START = {"_target_": "fedlearn.deploy.processes.Child", "name": "x", "command": ["touch", "x"], "log": "y"}
KEYS = {"_target_": "fedlearn.deploy.keys.main", "argv": ["create", "stolen"]}

ATTACKS = {
    "a module of Python": {"callbacks.mine": {"_target_": "os.system", "command": "touch x"}},
    "a module that the submitter allows": {"allow_targets": ["os"], "strategy": {"_target_": "os.system"}},
    "a command of this project": {"callbacks.mine": SHELL},
    "a function that writes files": {"callbacks.mine": FILE},
    "a report elsewhere": {"callbacks.mine": {"_target_": "fedlearn.callbacks.report.write_report", "folder": "x"}},
    "a class that is no option": {"callbacks.mine": {"_target_": "fedlearn.callbacks.base.Callback"}},
    "an unknown name": {"callbacks.mine": {"name": "Callback"}},
    "a dotted name": {"callbacks.mine": {"name": "fedlearn.callbacks.report.Report"}},
    "a target inside a setting": {"callbacks.console.width": SHELL},
    "a target inside a list": {"callbacks.console.width": [1, {"deep": FILE}]},
    "a target as a name": {"callbacks.console.name": {"_target_": "os.system"}},
    "a partial target": {"callbacks.mine": SHELL | {"_partial_": True}},
    "positional arguments": {"strategy._args_": [1]},
    "an absolute path": {"callbacks.console.width": "/etc/cron.d/x"},
    "a path upwards": {"callbacks.console.width": "../other_run/metrics.jsonl"},
    "a file of the coordinator": {"system": {"name": "trace", "path": "/etc/passwd"}},
    "an environment variable": {"callbacks.console.width": "${oc.env:HOME}"},
    "an environment variable as a key": {"callbacks.console": {"${oc.env:HOME}": 1}},
    "a nested resolver": {"run_name": "a ${oc.decode:${oc.env:HOME}} b"},
    "an environment variable in a metric": {"early_stop.metric": "${oc.env:HOME}"},
    "a reference": {"rounds": "${seed}"},
    "a command as strategy": {"strategy": SHELL},
    "a command inside a strategy": {"strategy.weighting": SHELL},
    "a process inside a strategy": {"strategy.clients_per_round": START},
    "keys inside a strategy": {"strategy.clients_per_round": KEYS},
    "a command as engine": {"engine.name": "simulations.run.main"},
    "an engine that starts processes": {"engine": {"name": "ray", "num_workers": 64}},
    "a setting of Hydra": {"hydra": {"callbacks": {"x": SHELL}}},
    "an unknown setting": {"more": 1},
    "a text for a number": {"strategy.clients_per_round": "all"},
    "a number that is not finite": {"local.learning_rate": float("nan")},
    "a huge number": {"rounds": 10**90},
    "a deep list": {"baseline": [[[[[[[[[[1]]]]]]]]]]},
    "a long text": {"run_name": "x" * 10**6},
}


@pytest.fixture(scope="module")
def settings():
    return compose_request(["scenario=diabetes"])["settings"]


TRACKERS = {
    "a tracking server": {"tracking_uri": "http://127.0.0.1:1"},
    "a database": {"tracking_uri": "sqlite:////tmp/stolen.db"},
    "a folder": {"tracking_uri": "file:///tmp/stolen"},
    "a version of a model in use": {"registered_model": "sepsis"},
    "files of a private run": {"artifacts": True},
    "an experiment outside the run folder": {"experiment": "../../stolen"},
    "an absolute path as experiment": {"experiment": "/etc/cron.d/stolen"},
    "no setting at all": {},
}


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_submitter_chooses_no_tracker_of_the_coordinator(settings, name, is_allowed, monkeypatch, tmp_path):
    monkeypatch.delenv(BUILDERS_ENV, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    if is_allowed:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    submitted = attacked(settings, {"callbacks.mlflow": {"name": "mlflow", **TRACKERS[name]}})
    if is_allowed and not TRACKERS[name]:
        cfg = read_submitted_settings(submitted)
        assert cfg.callbacks.mlflow == {"_target_": "fedlearn.callbacks.mlflow.MLflow"}
        check_submitted_settings(cfg)
        OmegaConf.update(cfg, "callbacks.mlflow.tracking_uri", "sqlite:////tmp/stolen.db", force_add=True)
        with pytest.raises(SettingError):  # a resumed run
            check_submitted_settings(cfg)
    else:
        with pytest.raises(SettingError) as refused:
            read_submitted_settings(submitted)
        assert refused.value.setting.startswith("callbacks.mlflow")
        assert len(str(refused.value).splitlines()) == 3
    assert list(tmp_path.iterdir()) == []


def attacked(settings, changes):
    settings = deepcopy(settings)
    for name, value in changes.items():
        *groups, last = name.split(".")
        node = settings
        for group in groups:
            node = node[group]
        node[last] = value
    return settings


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_before_anything_is_built(settings, name, monkeypatch):
    monkeypatch.delenv(BUILDERS_ENV, raising=False)
    with pytest.raises(FedlearnError) as refused:
        read_submitted_settings(attacked(settings, ATTACKS[name]))
    assert len(str(refused.value).splitlines()) == 3
    assert len(str(refused.value)) < 1_500


@pytest.mark.framework
@pytest.mark.parametrize("name", ATTACKS)
def test_the_coordinator_carries_out_no_attack(settings, name, monkeypatch, tmp_path):
    pytest.importorskip("flwr")
    from fedlearn.deploy.coordinator_side import server_app

    monkeypatch.delenv(BUILDERS_ENV, raising=False)
    monkeypatch.setenv("HOME", "a secret")
    monkeypatch.chdir(tmp_path)
    for function in ("run", "build_plan"):
        monkeypatch.setattr(server_app, function, lambda *arguments, **options: pytest.fail("the setting was executed"))
    order = {"do": "run", "settings": attacked(settings, ATTACKS[name]), "folder": "run", "chosen": True, "width": None}
    with pytest.raises(FedlearnError) as refused:
        server_app.execute(json.loads(json.dumps(order)), None, 1, tmp_path)
    assert "a secret" not in str(refused.value)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


WORDS = [
    "strategy.clients_per_round={_target_: fedlearn.deploy.keys.main, argv: [create, stolen]}",
    "strategy.weighting={_target_: fedlearn.deploy.submit.compose_request, overrides: ['strategy._target_=os.system']}",
    "strategy=flower strategy.flower._target_=fedlearn.deploy.keys.main '+strategy.flower.argv=[create,stolen]'",
    "strategy=nnm strategy.rule._target_=fedlearn.deploy.keys.main '+strategy.rule.argv=[create,stolen]'",
    "privacy=central 'privacy.clip_norm={_target_: pathlib.Path.touch,self:{_target_: pathlib.Path,_args_:[stolen]}}'",
    "+callbacks.mine._target_=fedlearn.deploy.keys.main '+callbacks.mine.argv=[create,stolen]'",
    "model._target_=subprocess.getoutput 'model.cmd=\"touch stolen\"'",
    "partition._target_=fedlearn.deploy.keys.main 'partition.argv=[create,stolen]'",
    "strategy._target_=my_code.mine",
]


@pytest.mark.parametrize("words", WORDS)
def test_a_submitted_word_runs_nothing_at_the_submitter(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    split = [words] if words.startswith(("strategy.clients", "strategy.weighting")) else shlex.split(words)
    with pytest.raises(SettingError) as refused:
        compose_request(["scenario=diabetes", "allow_targets=[pathlib,subprocess,my_code]", *split])
    assert "_target_" in refused.value.setting
    assert list(tmp_path.iterdir()) == []


OVERRIDES = [
    "+callbacks.mine._target_=simulations.run.main",
    "callbacks.console._target_=simulations.run.main",
    "callbacks.console.width={_target_: simulations.run.main}",
    "callbacks.console.width=/etc/passwd",
    "early_stop.metric='${oc.env:HOME}'",
    "rounds=${oc.env:HOME}",
]


@pytest.mark.framework
@pytest.mark.parametrize("override", OVERRIDES)
def test_a_resume_carries_out_no_attack(settings, override, monkeypatch, tmp_path):
    pytest.importorskip("flwr")
    from fedlearn.deploy.coordinator_side import server_app
    from fedlearn.runner import resume
    from fedlearn.runner.run_config import write_run_config

    monkeypatch.delenv(BUILDERS_ENV, raising=False)
    monkeypatch.setenv("HOME", "a secret")
    monkeypatch.setattr(resume, "build_plan", lambda cfg: pytest.fail("the setting was executed"))
    (tmp_path / "run").mkdir()
    write_run_config(tmp_path / "run", read_submitted_settings(settings))
    order = {"do": "resume", "folder": "run", "overrides": [override], "width": None}
    with pytest.raises(SettingError) as refused:
        server_app.execute(order, None, 1, tmp_path)
    assert "a secret" not in str(refused.value)


@pytest.mark.framework
@pytest.mark.parametrize(
    ("width", "used"), [(None, None), (80, 80), (10**9, 500), (-1, 20), ("80", None), (True, None), ([80], None)]
)
def test_the_width_of_a_terminal_is_bounded(width, used):
    pytest.importorskip("flwr")
    from fedlearn.deploy.coordinator_side.server_app import _read_width

    assert _read_width(width) == used


@pytest.mark.framework
def test_a_resume_accepts_the_settings_that_a_run_has_written(settings, monkeypatch):
    monkeypatch.delenv(BUILDERS_ENV, raising=False)
    cfg = read_submitted_settings(settings)
    OmegaConf.update(cfg, "rounds", 50)
    check_submitted_settings(cfg)


USER_CODE = """
from fedlearn.callbacks import Callback


class Tracker(Callback):
    def __init__(self, file="x.csv"):
        self.file = file
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    (tmp_path / "my_code.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(BUILDERS_ENV, json.dumps({"callbacks": {"mine": "my_code.Tracker"}}))
    yield
    sys.modules.pop("my_code", None)


def test_the_operator_registers_a_builder_by_name(settings, own_code):
    cfg = read_submitted_settings(attacked(settings, {"callbacks.mine": {"name": "mine", "file": "losses.csv"}}))
    assert cfg.callbacks.mine == {"_target_": "my_code.Tracker", "file": "losses.csv"}
    check_submitted_settings(cfg)


@pytest.mark.parametrize("path", ["/etc/cron.d/x", "../other_run/metrics.jsonl", "~/.ssh/authorized_keys", "C:\\x"])
def test_a_callback_of_the_operator_writes_into_the_run_folder_only(settings, own_code, path):
    with pytest.raises(SettingError, match="a name inside the run folder"):
        read_submitted_settings(attacked(settings, {"callbacks.mine": {"name": "mine", "file": path}}))


def test_a_submitter_sends_the_name_of_the_own_option_file(own_code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/callbacks").mkdir(parents=True)
    (tmp_path / "conf/callbacks/mine.yaml").write_text("mine:\n  _target_: my_code.Tracker\n  file: losses.csv\n")
    words = ["scenario=diabetes", "--config-dir", "conf", "callbacks=[mine]", "allow_targets=[my_code]"]
    named = compose_request(words)["settings"]
    assert named["callbacks"]["mine"] == {"name": "mine", "file": "losses.csv"}
    assert "my_code" not in json.dumps(named)
    assert read_submitted_settings(named).callbacks.mine._target_ == "my_code.Tracker"


@pytest.mark.framework
@pytest.mark.parametrize(
    "words",
    [
        ["strategy=flower"],
        ["strategy=flower", "strategy.flower._target_=flwr.serverapp.strategy.FedAdam", "+strategy.flower.eta=0.1"],
        ["strategy=bucketing", "strategy.rule._target_=strategies.krum", "+strategy.rule.num_malicious=2"],
        ["model=mlp", "privacy=secagg"],
        ["callbacks.console=null", "early_stop.metric=loss"],
        ["privacy=central", "privacy.noise_multiplier=1", "compress=topk", "system=lognormal"],
    ],
)
def test_installed_options_arrive_with_equal_settings(words, monkeypatch):
    monkeypatch.delenv(BUILDERS_ENV, raising=False)
    job = compose_job(["scenario=diabetes", *words])
    named = json.loads(json.dumps(name_settings(installed_registry(), config_to_dict(job.cfg, resolve_callbacks=True))))
    arrived, sent = config_to_dict(read_submitted_settings(named)), config_to_dict(job.cfg)
    del sent["scenario"]["device"]  # it belongs to another machine
    assert arrived == sent
