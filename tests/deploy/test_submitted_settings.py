"""A submitter starts runs at the coordinator, without access to its shell, files or environment."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

from fedlearn.deploy.coordinator import ALLOW_ENV
from fedlearn.deploy.coordinator_side.submitted_settings import check_submitted_settings
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.runner.compose import compose
from fedlearn.runner.run_config import config_from_dict, config_to_dict
from fedlearn.runner.start import parse_args

SHELL = {"_target_": "simulations.run.main", "argv": ["strategy._target_=os.system", "allow_targets=[os]"]}
FILE = {"_target_": "fedlearn.core.checkpoint.write_atomically", "path": "x", "content": "y"}

ATTACKS = {
    "a module of Python": {"callbacks.mine": {"_target_": "os.system", "command": "touch x"}},
    "a module that the submitter allows": {
        "allow_targets": ["os"],
        "callbacks.mine": {"_target_": "os.system", "command": "touch x"},
    },
    "a module in another form": {"allow_targets": "subprocess"},
    "a command of this project": {"callbacks.mine": SHELL},
    "a function that writes files": {"callbacks.mine": FILE},
    "a report elsewhere": {"callbacks.mine": {"_target_": "fedlearn.callbacks.report.write_report", "folder": "x"}},
    "a class that is no option": {"callbacks.mine": {"_target_": "fedlearn.callbacks.base.Callback"}},
    "a target inside a setting": {"callbacks.console.width": SHELL},
    "a target inside a list": {"callbacks.console.width": [1, {"deep": FILE}]},
    "a target as a list": {"callbacks.console._target_": {"_target_": "os.system"}},
    "the console replaced": {"callbacks.console._target_": "simulations.run.main"},
    "a partial target": {"callbacks.mine": SHELL | {"_partial_": True}},
    "an absolute path": {"callbacks.console.width": "/etc/cron.d/x"},
    "a path upwards": {"callbacks.console.width": "../other_run/metrics.jsonl"},
    "a path of the user": {"callbacks.console.width": "~/.ssh/authorized_keys"},
    "a path of Windows": {"callbacks.console.width": "C:\\x"},
    "an environment variable": {"callbacks.console.width": "${oc.env:HOME}"},
    "an environment variable as a key": {"callbacks.console": {"${oc.env:HOME}": 1}},
    "a nested resolver": {"run_name": "a ${oc.decode:${oc.env:HOME}} b"},
    "an environment variable in a metric": {"early_stop.metric": "${oc.env:HOME}"},
    "a command as strategy": {"strategy": SHELL},
    "a command inside a strategy": {"strategy.weighting": SHELL},
    "a command as engine": {"engine._target_": "simulations.run.main"},
}


@pytest.fixture(scope="module")
def settings():
    (job,) = compose(parse_args(["engine=grid", "scenario=diabetes"]))
    return config_to_dict(job.cfg)


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
    monkeypatch.delenv(ALLOW_ENV, raising=False)
    with pytest.raises(SettingError) as refused:
        check_submitted_settings(config_from_dict(attacked(settings, ATTACKS[name])))
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.framework
@pytest.mark.parametrize("name", ATTACKS)
def test_the_coordinator_carries_out_no_attack(settings, name, monkeypatch, tmp_path):
    pytest.importorskip("flwr")
    from fedlearn.deploy.coordinator_side import server_app

    monkeypatch.delenv(ALLOW_ENV, raising=False)
    monkeypatch.setenv("HOME", "a secret")
    monkeypatch.chdir(tmp_path)
    for function in ("run", "build_plan"):
        monkeypatch.setattr(server_app, function, lambda *arguments, **options: pytest.fail("the setting was executed"))
    order = {"do": "run", "settings": attacked(settings, ATTACKS[name]), "folder": "run", "chosen": True, "width": None}
    with pytest.raises(FedlearnError) as refused:
        server_app.execute(json.loads(json.dumps(order)), None, 1, tmp_path)
    assert "a secret" not in str(refused.value)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


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

    monkeypatch.delenv(ALLOW_ENV, raising=False)
    monkeypatch.setenv("HOME", "a secret")
    monkeypatch.setattr(resume, "build_plan", lambda cfg: pytest.fail("the setting was executed"))
    (tmp_path / "run").mkdir()
    write_run_config(tmp_path / "run", config_from_dict(settings))
    order = {"do": "resume", "folder": "run", "overrides": [override], "width": None}
    with pytest.raises(SettingError) as refused:
        server_app.execute(order, None, 1, tmp_path)
    assert "a secret" not in str(refused.value)


@pytest.mark.parametrize("target", ["my_code.Tracker", "my_code.deep.Tracker"])
def test_the_operator_allows_modules(settings, target, monkeypatch):
    monkeypatch.setenv(ALLOW_ENV, "other,my_code")
    changes = {"allow_targets": ["my_code"], "callbacks.mine": {"_target_": target, "file": "losses.csv"}}
    check_submitted_settings(config_from_dict(attacked(settings, changes)))


@pytest.mark.parametrize("target", ["my_code2.Tracker", "my.Tracker", "os.system"])
def test_a_module_with_a_similar_name_is_not_allowed(settings, target, monkeypatch):
    monkeypatch.setenv(ALLOW_ENV, "my_code")
    changes = {"allow_targets": ["my_code"], "callbacks.mine": {"_target_": target}}
    with pytest.raises(SettingError, match="the operator allows \\(my_code\\)"):
        check_submitted_settings(config_from_dict(attacked(settings, changes)))


@pytest.mark.parametrize(
    "words",
    [
        ["strategy=flower"],
        ["strategy=bucketing"],
        ["model=mlp", "privacy=secagg"],
        ["callbacks.console=null", "early_stop.metric=loss"],
        ["privacy=central", "privacy.noise_multiplier=1", "compress=topk", "system=lognormal"],
    ],
)
def test_installed_options_are_accepted(words, monkeypatch):
    monkeypatch.delenv(ALLOW_ENV, raising=False)
    (job,) = compose(parse_args(["engine=grid", "scenario=diabetes", *words]))
    check_submitted_settings(config_from_dict(json.loads(json.dumps(config_to_dict(job.cfg)))))
