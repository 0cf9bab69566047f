"""Everything that a message or a configuration may name is a builder of an option, and a builder only builds."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import fedlearn
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.runner.builders import STRATEGY_PARTS, check_targets, find_target, is_library_builder
from fedlearn.runner.conf_files import CONF_DIR, OPTION_GROUPS
from fedlearn.runner.instantiation import build
from fedlearn.runner.registry import (
    FLOWER_STRATEGIES,
    GROUPS,
    OPERATOR_SETTINGS,
    PARTS,
    default_values,
    installed_registry,
    parameter_types,
)

# groups of an order to a node; the other groups are built by the coordinator or in simulations
NODE_GROUPS = ("scenario", "model", "partition", "strategy", "flower", "privacy", "compress")
SIDE_EFFECTS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.connect")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree", "os.link")
NEEDS = {"from_flower": ({"flower": {"_target_": "flwr.serverapp.strategy.FedAvg"}})}
RECORDED: list[str] = []
ROOT = Path(fedlearn.__file__).parents[1]


def record(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if event in (*SIDE_EFFECTS, *CHANGES) or writes:
        RECORDED.append(f"{event} {arguments[:2]}")


sys.addaudithook(record)


def options():
    """Return group, name and dotted name of each installed option."""
    builders = installed_registry().builders
    return [(group, name, target) for group in GROUPS for name, target in builders[group].items()]


def test_every_target_in_the_option_files_is_a_registered_builder():
    texts = {path: path.read_text(encoding="utf-8") for path in CONF_DIR.rglob("*.yaml")}
    named = {target for text in texts.values() for target in re.findall(r"_target_: *([\w.]+)", text)} - {"null"}
    registered = {target for _, _, target in options() if target}
    assert named - registered == set()
    assert registered - named == {f"flwr.serverapp.strategy.{name}" for name in FLOWER_STRATEGIES} - named


def test_every_group_of_option_files_is_known():
    folders = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    assert folders - {"experiment", "debug"} == set(OPTION_GROUPS)  # these two choose options and name no code
    for path in [*(CONF_DIR / "experiment").glob("*.yaml"), *(CONF_DIR / "debug").glob("*.yaml")]:
        assert "_target_" not in yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.framework
@pytest.mark.parametrize(("group", "name", "target"), options(), ids=lambda value: str(value))
def test_a_registered_builder_is_a_public_function_or_class_that_returns_one_kind(group, name, target):
    if target is None:
        assert group == "model"
        return
    module, _, attribute = target.rpartition(".")
    pytest.importorskip(module.partition(".")[0])
    builder = find_target(target, group)
    assert inspect.isfunction(inspect.unwrap(builder)) or inspect.isclass(builder)
    assert not attribute.startswith("_")
    assert attribute not in ("main", "run", "build", "start", "create", "serve")
    parameters = inspect.signature(builder).parameters
    assert "argv" not in parameters
    kinds = {p.kind for p in parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, "it takes any setting"


def library_names():
    """Return the dotted name of each function and class of the library, of some methods, and of some wrong places."""
    found = set()
    for package in ("fedlearn", "strategies", "simulations"):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            names = re.findall(r"^(?:def|class) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            methods = {f"{name}.{method}" for name in names for method in ("__init__", "start", "read")}
            places = (module, module.rpartition(".")[0], package)
            found |= {module, *(f"{place}.{name}" for place in places for name in (*names, *methods))}
    return found


def test_of_all_names_in_the_library_only_registered_builders_and_parts_are_accepted():
    registered = {target for _, _, target in options() if target}
    names = library_names()
    assert len(names) > 5_000
    accepted = {name for name in names for group in (None, *GROUPS) if is_library_builder(name, group)}
    assert accepted <= registered | STRATEGY_PARTS
    assert {"fedlearn.deploy.keys.main", "fedlearn.deploy.processes.Child.start", "fedlearn.runner.start.main"} <= names


@pytest.mark.parametrize("part", sorted(STRATEGY_PARTS))
def test_a_part_of_a_strategy_is_documented_and_builds_a_part(part):
    namespace, _, name = part.rpartition(".")
    assert name in importlib.import_module(namespace).__all__
    assert f"`{name}`" in (Path(CONF_DIR).parent / "docs/api.md").read_text(encoding="utf-8")


@pytest.mark.framework
@pytest.mark.parametrize(
    ("group", "name", "target"),
    [row for row in options() if row[2] and row[0] not in ("scenario", "engine", "model")],
    ids=lambda value: str(value),
)
def test_a_builder_starts_no_process_and_writes_no_file(group, name, target, tmp_path, monkeypatch):
    if "flwr" in target or "flower" in target:
        pytest.importorskip("flwr")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hostile", "create", "keys"])
    required = {key for key, hint in parameter_types(target).items() if key not in default_values(target)}
    values = NEEDS.get(target.rpartition(".")[2], {}) or dict.fromkeys(required, 1)
    build_quietly(target, values, group)  # imports write caches
    RECORDED.clear()
    build_quietly(target, values, group)
    assert [event for event in RECORDED if "/dev/null" not in event] == []
    assert list(tmp_path.iterdir()) == []


def build_quietly(target, values, group):
    with suppress(FedlearnError):  # e.g. a noise multiplier is missing
        build({"_target_": target, **values}, group)


@pytest.mark.parametrize(("group", "key"), PARTS)
def test_a_parameter_that_takes_an_object_is_a_part_or_is_refused(group, key):
    assert PARTS[group, key] in GROUPS
    with pytest.raises(SettingError):
        installed_registry().resolve(group, {"name": first(group), key: {"_target_": "os.system"}})


def first(group):
    return next(name for name, target in installed_registry().builders[group].items() if target)


@pytest.mark.framework
def test_every_parameter_of_an_order_accepts_plain_values_or_a_named_part():
    pytest.importorskip("flwr")
    registry, target = installed_registry(), {"_target_": "os.system"}
    for group in NODE_GROUPS:
        for name, target in registry.builders[group].items():
            for key in parameter_types(target) if target else ():
                for hostile in (
                    {"_target_": "os.system"},
                    [{"_target_": "os.system"}],
                    "${oc.env:HOME}",
                    {"_args_": []},
                ):
                    with pytest.raises(SettingError):
                        registry.resolve(group, {"name": name, key: hostile})
                if key in OPERATOR_SETTINGS:
                    with pytest.raises(SettingError, match=r"there is no|not a path"):
                        registry.resolve(group, {"name": name, key: "/etc/passwd"})


LOCAL = [
    ("strategy", {"_target_": "strategies.fedavg", "clients_per_round": {"_target_": "fedlearn.deploy.keys.main"}}),
    ("strategy", {"_target_": "fedlearn.deploy.keys.main", "argv": ["create", "x"]}),
    ("strategy", {"_target_": "fedlearn.run"}),
    ("strategy", {"_target_": "strategies.nnm", "rule": {"_target_": "simulations.run.main"}}),
    ("strategy", {"_target_": "strategies.nnm", "rule": {"_target_": "fedlearn.engines.ray.engine.ray"}}),
    ("strategy", {"_target_": "fedlearn.Strategy", "select": {"_target_": "fedlearn.deploy.processes.Child.start"}}),
    ("strategy", {"_target_": "fedlearn.Strategy", "stages": [{"deep": [{"_target_": "fedlearn.deploy.keys.main"}]}]}),
    ("strategy", {"_target_": "flwr.serverapp.strategy.FedAvg.start", "self": 1}),
    ("strategy", {"_target_": "flwr.serverapp.strategy.FedAvg"}),
    ("strategy", {"_target_": "strategies.fedavg", "weighting": {"_target_": "simulations.scenarios.heart.heart"}}),
    ("strategy", {"_target_": "fedlearn.algorithm.strategy.Strategy"}),
    ("scenario", {"_target_": "simulations.scenarios.heart.heart", "model": {"_target_": "simulations.run.main"}}),
    ("scenario", {"_target_": "simulations.scenarios.heart.heart", "seed": {"_target_": "strategies.fedavg"}}),
    ("scenario", {"_target_": "simulations.datasets.mnist.read_images", "path": "/etc"}),
    ("privacy", {"_target_": "fedlearn.runner.instantiation.build", "node": 1, "setting": "x"}),
    ("privacy", {"_target_": "fedlearn.privacy.mechanisms.central", "clip_norm": {"_target_": "fedlearn.serial"}}),
    ("engine", {"_target_": "fedlearn.core.checkpoint.os.remove"}),
    ("callbacks.mine", {"_target_": "fedlearn.callbacks.report.write_report"}),
    ("callbacks.mine", {"_target_": "simulations.run.main"}),
]
RESOLVED_AGAIN = "${oc.create:{_target_: fedlearn.deploy.keys.main, argv: [create, stolen]}}"


@pytest.mark.parametrize("escape", ["", "\\", "\\\\\\"])
def test_no_value_is_resolved_a_second_time(escape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = f"{escape}{RESOLVED_AGAIN}"
    for node in ({"clients_per_round": value}, {"weighting": [{"deep": value}]}, {value: 1}):
        settings = {"_target_": "strategies.fedavg", **node}
        for form in (settings, OmegaConf.create(settings)):
            with pytest.raises(FedlearnError):
                build(form, "strategy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("setting", "node"), LOCAL, ids=str)
def test_a_configuration_names_no_other_function_of_the_library_at_any_depth(setting, node, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = set(sys.modules)
    with pytest.raises(SettingError) as refused:
        check_targets(node, setting)
    assert refused.value.setting.endswith("_target_")
    assert "allow_targets" not in str(refused.value)  # no consent makes the library's functions available
    assert {name for name in set(sys.modules) - loaded if name.startswith("fedlearn.deploy")} == set()
    assert list(tmp_path.iterdir()) == []
