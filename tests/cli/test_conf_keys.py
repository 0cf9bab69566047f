"""The option files in conf/ have exactly the arguments of their functions, with equal defaults."""

from __future__ import annotations

import inspect
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from fedlearn.core.records import LocalSettings
from fedlearn.loop.schedule import Schedule
from fedlearn.runner.compose import CONF_DIR

GIVEN_AT_BUILD = {"engine": ("data", "trainer", "rebuild")}
SHARED = ("framework", "seed", "device", "model", "partition")
GROUPS = ("strategy", "scenario", "partition", "engine", "privacy", "poisoning", "compress", "system")
FILES = sorted(path for group in GROUPS for path in (CONF_DIR / group).glob("*.yaml") if path.stem != "custom")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_has_exactly_the_parameters_of_its_function_and_their_defaults(path: Path):
    given = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    given = given.get(path.parent.name, given)  # some scenarios have settings of other groups
    parameters = dict(inspect.signature(get_object(given.pop("_target_"))).parameters)
    for name in GIVEN_AT_BUILD.get(path.parent.name, ()):
        parameters.pop(name, None)
    assert list(given) == list(parameters)
    shared = {name: f"${{{name}}}" for name in SHARED if name in parameters}
    if given.get("clients_per_round") == "${cohort}":
        shared["clients_per_round"] = parameters["clients_per_round"].default or "${cohort}"
    if given.get("momentum") == "${local.momentum}":
        assert parameters["momentum"].default == LocalSettings().momentum
        shared["momentum"] = given["momentum"]
    built = {name: value for name, value in given.items() if isinstance(value, dict) and "_target_" in value}
    assert given == {name: parameter.default for name, parameter in parameters.items()} | shared | built


def test_each_callback_has_exactly_the_parameters_of_its_class_and_their_defaults():
    from fedlearn.runner.callbacks import default_callbacks, references

    cfg = OmegaConf.load(CONF_DIR / "config.yaml")
    for name, node in default_callbacks().items():
        parameters = dict(inspect.signature(get_object(node.pop("_target_"))).parameters)
        parameters.pop("file", None)  # a stream, for tests
        assert list(node) == list(parameters), name
        given = node | {key: OmegaConf.select(cfg, setting) for key, setting in references(node).items()}
        assert given == {key: parameter.default for key, parameter in parameters.items()}, name


def test_there_is_a_file_for_every_strategy():
    import strategies

    files = {path.stem for path in (CONF_DIR / "strategy").glob("*.yaml")}
    assert files == {*strategies.__all__, "flower"}  # "flower" accepts each strategy of Flower


def test_the_run_settings_are_those_of_the_records_with_their_defaults():
    config = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "config.yaml"), resolve=False)
    ours = [field for field in fields(LocalSettings) if field.name != "example_dp"]  # only privacy=example sets it
    assert config["local"] == {field.name: field.default for field in ours}
    schedule = {field.name: field.default for field in fields(Schedule) if field.name != "rounds"}
    assert {name: config[name] for name in schedule} == schedule


def settings(*words: str):
    from fedlearn.runner.compose import compose
    from fedlearn.runner.start import parse_args

    (job,) = compose(parse_args([*words]))
    return job.cfg


def test_a_scenario_may_bring_settings_over_which_recipes_and_words_go():
    assert settings("scenario=movielens").strategy._target_ == "strategies.fcf"
    assert settings("scenario=movielens", "strategy=fedavg").strategy._target_ == "strategies.fedavg"
    users = settings("scenario=sent140")
    assert (users.strategy._target_, users.strategy.clients_per_round) == ("strategies.fedadam", 100)
    assert (users.local.batch_size, users.local.learning_rate, users.local.epochs) == (8, 2.0, 1)
    assert settings("scenario=sent140", "strategy=fedprox").strategy.clients_per_round == 100
    assert "clients_per_round" not in settings("scenario=sent140", "strategy=afl").strategy
    assert settings("scenario=sent140", "cohort=7", "rounds=3").strategy.clients_per_round == 7
    assert settings("scenario=sent140", "strategy.clients_per_round=9").strategy.clients_per_round == 9
    assert settings("experiment=movielens", "cohort=7").rounds == 32
    assert settings("strategy=fedprox").strategy.clients_per_round is None


def commands_of(recipe: Path) -> list[list[str]]:
    """Return the words of each command for simulations in the comments of a recipe, without seeds."""
    comments = re.sub(r"\\\n#\s*", " ", recipe.read_text(encoding="utf-8").partition("\ndefaults:")[0])
    commands = re.findall(r"^# +python -m simulations\.run (.*?)(?: {5}.*)?$", comments, re.MULTILINE)
    return [[word for word in shlex.split(command) if not word.startswith("seed=")] for command in commands]


RECIPES = {path.stem: path for path in sorted((CONF_DIR / "experiment").glob("*.yaml"))}


@pytest.mark.parametrize("name", [name for name in RECIPES if commands_of(RECIPES[name])])
def test_no_command_of_a_recipe_has_a_setting_that_is_refused(name):
    from fedlearn.loop.rule_support import require_settings, require_steps
    from fedlearn.runner.compose import compose
    from fedlearn.runner.plan import build_plan
    from fedlearn.runner.start import parse_args

    for job in [job for words in commands_of(RECIPES[name]) for job in compose(parse_args(words))]:
        plan = build_plan(job.cfg)
        require_settings(plan.strategy.local, plan.local)
        require_steps(plan.strategy, plan.local)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "experiment").glob("flamby_heart_fed*.yaml")))
def test_every_flamby_experiment_composes_and_states_the_published_result(name):
    cfg = settings(f"experiment={name}")
    assert cfg.scenario._target_.endswith("flamby_heart")
    assert cfg.strategy._target_ == f"strategies.{name.rpartition('_')[2]}"
    assert (cfg.rounds, cfg.local.steps, cfg.local.batch_size) == (15, 100, 4)
    assert "Published accuracy" in (CONF_DIR / "experiment" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "experiment").glob("*_dp*.yaml")))
def test_every_private_experiment_can_be_planned_and_states_the_accuracy_to_expect(name):
    from fedlearn.runner.plan import build_plan

    assert build_plan(settings(f"experiment={name}")).privacy.kind in ("central", "example")
    assert "# Accuracy" in (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
