"""conf/ offers what the functions take, with the same defaults: no more, no less."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from fedlearn.loop import Schedule
from fedlearn.records import LocalSettings
from simulations.overrides import CONF

GIVEN_AT_BUILD = {"engine": ("data", "trainer", "rebuild")}
SHARED = ("framework", "seed", "device")
GROUPS = ("strategy", "scenario", "engine", "privacy", "attack", "compress", "system")
FILES = sorted(path for group in GROUPS for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_has_exactly_the_parameters_of_its_function_and_their_defaults(path: Path):
    given = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    parameters = dict(inspect.signature(get_object(given.pop("_target_"))).parameters)
    for name in GIVEN_AT_BUILD.get(path.parent.name, ()):
        parameters.pop(name, None)
    assert list(given) == list(parameters)
    shared = {name: f"${{{name}}}" for name in SHARED if name in parameters}
    built = {name: value for name, value in given.items() if isinstance(value, dict) and "_target_" in value}
    assert given == {name: parameter.default for name, parameter in parameters.items()} | shared | built


def test_there_is_a_file_for_every_strategy():
    import strategies

    files = {path.stem for path in (CONF / "strategy").glob("*.yaml")}
    assert files == {*strategies.__all__, "flower"}  # which takes any of Flower's


def test_the_run_settings_are_those_of_the_records_with_their_defaults():
    config = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)
    ours = [field for field in fields(LocalSettings) if field.name != "example_dp"]  # set by privacy=example alone
    assert config["local"] == {field.name: field.default for field in ours}
    schedule = {field.name: field.default for field in fields(Schedule) if field.name != "rounds"}
    assert {name: config[name] for name in schedule} == schedule


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("flamby_heart_fed*.yaml")))
def test_every_flamby_experiment_composes_and_states_the_published_result(name):
    from simulations.overrides import compose
    from simulations.run import arguments

    (job,) = compose(arguments([f"experiment={name}"]))
    assert job.cfg.scenario._target_.endswith("flamby_heart")
    assert job.cfg.strategy._target_ == f"strategies.{name.rpartition('_')[2]}"
    assert (job.cfg.rounds, job.cfg.local.steps, job.cfg.local.batch_size) == (15, 100, 4)
    assert "Published pooled-test accuracy" in (CONF / "experiment" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("*_dp*.yaml")))
def test_every_private_experiment_can_be_planned_and_states_the_accuracy_to_expect(name):
    from fedlearn.config import plan
    from simulations.overrides import compose
    from simulations.run import arguments

    (job,) = compose(arguments([f"experiment={name}"]))
    assert plan(job.cfg).privacy.kind in ("central", "example")
    assert "# Accuracy" in (CONF / "experiment" / f"{name}.yaml").read_text()
