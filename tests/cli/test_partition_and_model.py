"""`partition` and `model` are setting groups of each scenario."""

from __future__ import annotations

import inspect
import sys
from textwrap import dedent

import numpy as np
import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from fedlearn.data.partition import PARTITIONS, as_partition
from fedlearn.errors import DataError, SettingError
from fedlearn.runner.compose import CONF_DIR, UsageError, compose
from fedlearn.runner.experiment import build_scenario
from fedlearn.runner.plan import build_plan
from fedlearn.runner.run_config import config_from_dict, config_to_dict
from fedlearn.runner.start import main, parse_args

SCENARIOS = sorted(path.stem for path in (CONF_DIR / "scenario").glob("*.yaml"))
RECIPES = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
CODE = """
    from dataclasses import dataclass
    import numpy as np
    from torch import nn
    from fedlearn import serial
    from fedlearn.data import Partition

    @dataclass(frozen=True, kw_only=True)
    class Alternating(Partition):
        start: int = 0

        def client_rows(self, rows, seed):
            return [np.arange((self.start + k) % self.num_clients, len(rows), self.num_clients)
                    for k in range(self.num_clients)]

    class Net(nn.Module):
        def __init__(self, hidden=3, inputs=10, largest=1000):
            super().__init__()
            self.largest = largest
            self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.Linear(hidden, 1))

        def forward(self, x):
            if len(x) > self.largest:
                raise RuntimeError("this batch is too large")
            return self.layers(x)

    def number():
        return 3

    def engine(data, trainer, *, log=None):
        return serial(data, trainer)

    engine.in_process = True
"""


@pytest.fixture
def own_code(here, monkeypatch):
    """Put the user's module my_parts on the import path."""
    (here / "my_parts.py").write_text(dedent(CODE))
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    yield here
    sys.modules.pop("my_parts", None)


def composed(*words: str):
    return compose(parse_args(words))[0].cfg


def kind(cfg) -> str:
    return next(name for name, cls in PARTITIONS.items() if cfg.partition._target_.endswith(f".{cls.__name__}"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_default_of_a_scenario_is_that_of_its_function(scenario):
    cfg = composed(f"scenario={scenario}")
    parameters = inspect.signature(get_object(cfg.scenario._target_)).parameters
    if parameters["model"].default is None:
        assert cfg.model["_target_"] == "fedlearn.trainers.pretrained.PretrainedModel"
    else:
        assert cfg.model == parameters["model"].default
    if "partition" in parameters and parameters["partition"].default is not None:
        assert kind(cfg) == parameters["partition"].default
    else:
        assert cfg.partition is None
    received = OmegaConf.to_container(cfg.scenario, resolve=True)
    assert received.get("partition") == OmegaConf.to_container(cfg, resolve=True)["partition"]


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_partition_has_exactly_its_settings_on_the_command_line(name):
    values = {"num_clients": 3, "test_share": 0.1, "alpha": 0.1, "classes_per_client": 1, "strictness": 0.1}
    has = {setting: value for setting, value in values.items() if hasattr(PARTITIONS[name](), setting)}
    chosen = composed(f"partition={name}", *(f"partition.{setting}={value}" for setting, value in has.items()))
    assert {setting: chosen.partition[setting] for setting in has} == has
    lacked = next(setting for setting in values if setting not in has)
    with pytest.raises(UsageError, match=f"did you mean partition=[a-z]+ partition.{lacked}="):
        composed(f"partition={name}", f"partition.{lacked}=1")


def test_the_command_line_wins_over_a_recipe_and_a_recipe_over_a_scenario():
    recipe = composed("experiment=mnist_fedavg")
    assert (kind(recipe), recipe.partition.num_clients, recipe.model) == ("iid", 100, "mcmahan_2nn")
    typed = composed("experiment=mnist_fedavg", "partition=shards", "partition.num_clients=7", "model=lenet")
    assert (kind(typed), typed.partition.num_clients, typed.model) == ("shards", 7, "lenet")
    assert kind(composed("experiment=cifar10_fedadam")) == "dirichlet_equal"
    assert kind(composed("scenario=digits", "partition=iid")) == "iid"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_its_settings_are_those_of_its_partition(recipe):
    cfg = composed(f"experiment={recipe}")
    build_plan(cfg)


def test_a_sweep_takes_each_value():
    jobs = compose(parse_args(["-m", "scenario=digits", "partition=iid,shards", "model=mlp,cnn"]))
    assert [(kind(job.cfg), job.cfg.model) for job in jobs] == [("iid", "mlp"), ("shards", "mlp"), ("iid", "cnn")]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["scenario=flamby_heart", "partition=iid"], "partition is .*Iid\n.*null"),
        (["model.hidden=3"], r"model\.hidden is 3\n.*\n  try       model\._target_"),
        (["partition=custom"], r"partition\._target_ is None"),
        (["partition=iid", "+partition.alpha=3"], r"partition\.alpha is 3\n.*there is no alpha"),
        (["model._target_=os.system"], r"model\._target_ is os\.system"),
        (["partition._target_=os.system"], r"partition\._target_ is os\.system"),
        (["partition._target_=fedlearn.data.partition.Dirichlet", "partition.alpa=1"], r"try +partition\.alpha=1"),
    ],
)
def test_a_setting_without_effect_is_refused_before_anything_is_loaded(words, reason):
    with pytest.raises(SettingError, match=reason):
        build_plan(composed(*words))


@pytest.mark.parametrize("name", ["model", "partition"])
def test_a_file_must_not_set_what_the_scenario_receives(name, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\nscenario:\n  {name}: linear\n")
    with pytest.raises(SettingError, match=f"scenario.{name} is linear\n.*its name is {name}"):
        build_plan(composed("--config-dir", str(tmp_path), "experiment=mine"))


@pytest.mark.parametrize("scenario", ["movielens", "sent140", "shakespeare"])
def test_a_scenario_with_fixed_clients_refuses_other_partitions(scenario):
    with pytest.raises(SettingError, match=f"partition is iid\n.*the clients of scenario={scenario} are fixed"):
        build_scenario(composed(f"scenario={scenario}", "partition=iid"))
    with pytest.raises(SettingError, match=r"partition\.num_clients is 3"):
        build_scenario(composed(f"scenario={scenario}", "partition.num_clients=3"))


@pytest.mark.parametrize("scenario", ["diabetes", "heart", "digits"])
def test_a_partition_of_a_user_works_in_any_scenario(own_code, scenario, request):
    pytest.importorskip("torch")
    words = ["partition._target_=my_parts.Alternating", "partition.start=2", "partition.num_clients=5"]
    cfg = composed(f"scenario={scenario}", "model=linear", *words, "allow_targets=[my_parts]")
    build_plan(cfg)
    try:
        built = build_scenario(cfg)
    except DataError:
        pytest.skip("the heart disease data are not available")
    assert (built.partition, len(built.data.clients)) == ("Alternating", 5)


def test_a_model_of_a_user_runs_resumes_and_predicts(own_code, capsys):
    pytest.importorskip("torch")
    from fedlearn.runner.trained_model import load_trained_model
    from simulations.resume import main as resume

    words = ["scenario=diabetes", "model._target_=my_parts.Net", "model.hidden=4", "allow_targets=[my_parts]"]
    assert main([*words, "partition.num_clients=3", "rounds=1", "report=false", "hydra.run.dir=run"]) == 0
    assert "Net · 49 parameters" in capsys.readouterr().out
    assert resume(["run", "rounds=2"]) == 0
    assert load_trained_model(own_code / "run").round == 2


def test_an_engine_of_a_user_gets_no_settings_of_the_default_engine(own_code):
    pytest.importorskip("torch")
    words = ["scenario=diabetes", "engine._target_=my_parts.engine", "engine.log=x", "allow_targets=[my_parts]"]
    assert main([*words, "partition.num_clients=3", "rounds=1", "report=false", "hydra.run.dir=run"]) == 0


def test_the_log_of_a_round_that_fails_has_the_traceback_of_a_client(own_code):
    pytest.importorskip("torch")
    words = ["scenario=diabetes", "model._target_=my_parts.Net", "model.largest=9", "allow_targets=[my_parts]"]
    assert main([*words, "partition.num_clients=3", "rounds=1", "report=false", "hydra.run.dir=run"]) == 3
    assert "my_parts.py" in (own_code / "run/run.log").read_text()


def test_what_is_no_partition_is_refused(own_code):
    cfg = composed("scenario=diabetes", "partition._target_=my_parts.number", "allow_targets=[my_parts]")
    with pytest.raises(SettingError, match=r"partition is 3\n.*Partition"):
        build_scenario(cfg)


def test_settings_that_travelled_build_the_same_clients():
    pytest.importorskip("torch")
    cfg = composed("scenario=digits", "partition=shards", "partition.num_clients=4", "model=linear")
    here, there = build_scenario(cfg), build_scenario(config_from_dict(config_to_dict(cfg)))
    for client in range(4):
        assert np.array_equal(here.data.train(client).x, there.data.train(client).x)


def test_names_and_objects_are_equal_in_python():
    assert as_partition("iid", num_clients=3) == as_partition(PARTITIONS["iid"](), num_clients=3)
    assert as_partition("natural", num_clients=3).num_clients is None
