"""A user's own strategy, model and scenario in the user's folder: named in YAML, imported only if allowed."""

from __future__ import annotations

import sys
from textwrap import dedent

import pytest

from fedlearn.errors import SettingError
from fedlearn.runner.builders import BuildError
from fedlearn.runner.instantiation import build
from fedlearn.runner.start import main
from simulations.resume import main as resume

CODE = """
    import numpy as np
    import torch
    from fedlearn import Scenario, Strategy, mean, uniform
    from fedlearn.data.from_arrays import from_arrays
    from simulations.models import build_trainer

    def halfway(*, clients_per_round=None, share=0.5):
        def shrunk(update_D, memory, context):
            return share * update_D, memory
        from fedlearn import Transform
        return Strategy(select=uniform(clients_per_round), aggregate=mean(), server=Transform(update=shrunk))

    def net(*, hidden=3):
        return torch.nn.Sequential(torch.nn.Linear(2, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1))

    def moons(*, model="linear", seed=1, framework="torch"):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(80, 2)).astype(np.float32)
        y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
        data = from_arrays(x, y, assignment=np.arange(80) % 4, task="binary", seed=seed)
        fitted, line = build_trainer(model, data, input_shape=(2,), framework=framework)
        return Scenario(name="moons", data=data, trainer=fitted, model=line)

    def broken(*, depth=1):
        raise ZeroDivisionError("no luck today")

    def wrong_kind():
        return 3
"""
FILES = {
    "strategy/halfway": "_target_: my_code.halfway\nclients_per_round: null\nshare: 0.5\n",
    "strategy/broken": "_target_: my_code.broken\ndepth: 1\n",
    "strategy/wrong_kind": "_target_: my_code.wrong_kind\n",
    "strategy/missing": "_target_: my_code.nothing_here\n",
    "strategy/elsewhere": "_target_: my_cod.halfway\n",
    "scenario/moons": "_target_: my_code.moons\nmodel: ${model}\nseed: ${seed}\nframework: ${framework}\n",
    "model/net": "_target_: my_code.net\nhidden: 3\n",
    "experiment/mine": "# @package _global_\ndefaults:\n  - override /scenario: moons\n"
    "  - override /strategy: halfway\n  - override /model: net\n\nrounds: 2\nallow_targets: [my_code]\n",
}


@pytest.fixture
def user_folder(here, monkeypatch):
    """Create a user's folder and make it importable, as if Python were started in it."""
    pytest.importorskip("torch")
    (here / "my_code.py").write_text(dedent(CODE))
    for name, text in FILES.items():
        path = here / f"my_conf/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "my_code", raising=False)
    yield here
    sys.modules.pop("my_code", None)


def words(*more: str) -> list[str]:
    return ["--config-dir", "my_conf", "hydra.run.dir=run", "report=false", *more]


def test_an_experiment_of_the_users_own_code_runs_and_resumes(user_folder, summary, capsys):
    assert main(words("experiment=mine")) == 0
    assert summary(user_folder / "run")["scenario"] == "moons"
    assert summary(user_folder / "run")["strategy"] == "halfway"
    shown = capsys.readouterr().out
    assert "13 parameters" in shown
    assert "share 0.5" in shown
    assert resume(["run", "rounds=3"]) == 0


@pytest.mark.slow
def test_it_is_the_same_from_a_shell(user_folder, command):
    options = ["--config-dir", "my_conf", "strategy=halfway", "scenario=diabetes", "rounds=1", "report=false"]
    assert command("simulations.run", *options, "allow_targets=[my_code]").returncode == 0
    refused = command("simulations.run", *options)
    assert refused.returncode == 2
    assert "allow_targets=[my_code]" in refused.stderr


@pytest.mark.parametrize("choice", ["strategy=halfway", "scenario=moons", "model=net"])
def test_code_that_is_not_allowed_is_refused_and_not_even_imported(user_folder, capsys, choice):
    assert main(words(choice, *([] if "scenario" in choice else ["scenario=diabetes"]))) == 2
    shown = capsys.readouterr().err
    assert "my_code" in shown
    assert "try       'allow_targets=[my_code]'" in shown
    assert "my_code" not in sys.modules
    assert not (user_folder / "run").exists()


def test_code_that_fails_is_told_in_a_few_words_with_its_traceback_in_the_log(user_folder, capsys):
    assert main(words("strategy=broken", "scenario=diabetes", "allow_targets=[my_code]")) == 3
    shown = capsys.readouterr().err
    assert "strategy cannot be built: ZeroDivisionError: no luck today" in shown
    assert "my_code.py, line" in shown
    assert "Traceback" not in shown
    assert "Traceback" in (user_folder / "run/run.log").read_text()


@pytest.mark.parametrize(
    ("strategy", "phrase"),
    [
        ("wrong_kind", "a builder that returns a Strategy; it returned int"),
        ("missing", "has no nothing_here"),
        ("elsewhere", "No module named 'my_cod'"),
    ],
)
def test_a_target_that_is_no_strategy_is_told(user_folder, capsys, strategy, phrase):
    assert main(words(f"strategy={strategy}", "scenario=diabetes", "allow_targets=[my_code,my_cod]")) == 2
    assert phrase in capsys.readouterr().err
    assert not (user_folder / "run").exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "fedlearn.runner.instantiation.os.system",
        "fedlearn.core.checkpoint.os.remove",
        "fedlearn.runner.instantiation.build",
        "fedlearn.runner.instantiation.instantiate",
        "fedlearn.runner.builders.import_module",
        "fedlearn.runner.start.Path",
        "fedlearn.runner.start.sys.exit",
        "fedlearn",
        "fedlearn_evil.f",
        "fedlearn.algorithm.aggregation.WEIGHTINGS",
        3,
    ],
)
def test_nothing_outside_the_allowed_modules_is_called_by_whatever_name(target):
    for node in ({"_target_": target}, {"_target_": "strategies.fedprox", "mu": [{"deep": {"_target_": target}}]}):
        with pytest.raises(SettingError) as refused:
            build(node, "strategy")
        assert "_target_" in refused.value.setting


def test_a_nested_builder_tells_its_setting_by_its_full_name():
    node = {"_target_": "fedlearn.Strategy", "select": {"_target_": "fedlearn.uniform", "clients_per_round": 0}}
    with pytest.raises(SettingError, match=r"^strategy\.select\.clients_per_round is 0"):
        build(node, "strategy")


def test_a_strategy_can_be_put_together_in_yaml_alone():
    node = {
        "_target_": "fedlearn.Strategy",
        "select": {"_target_": "fedlearn.everyone"},
        "local": {"_target_": "fedlearn.proximal", "mu": 0.1},
        "aggregate": {"_target_": "fedlearn.mean", "weighting": "equal"},
    }
    assert build(node, "strategy").aggregate.sensitivity is not None


def test_a_missing_parameter_is_told(user_folder):
    with pytest.raises(SettingError, match=r"strategy\.select is missing"):
        build({"_target_": "fedlearn.Strategy"}, "strategy")


def test_a_builder_that_fails_keeps_its_cause(user_folder):
    with pytest.raises(BuildError) as failed:
        build({"_target_": "my_code.broken"}, "strategy", allow=["my_code"])
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
