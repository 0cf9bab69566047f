"""Read the settings of a submission at the coordinator. A submission names options and never code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedlearn.advice import assignment
from fedlearn.callbacks.base import Callback
from fedlearn.deploy.coordinator import BUILDERS_ENV
from fedlearn.errors import SettingError, require
from fedlearn.runner.builders import find_target
from fedlearn.runner.named_settings import CALLBACKS, name_settings, resolve_settings
from fedlearn.runner.registry import Registry, installed_registry
from fedlearn.runner.run_config import config_from_dict, config_to_dict

REFERENCES = re.compile(r"\$\{[\w.]+\}")  # references to other settings of the run are safe


def coordinator_registry() -> Registry:
    """Return the options that a submission may name: the installed options and the builders of the operator."""
    return installed_registry().with_builders(json.loads(os.environ.get(BUILDERS_ENV) or "{}"))


def read_submitted_settings(named: Any) -> DictConfig:
    """Return the settings of a submission, with the builders of this coordinator.

    Nothing is built, and only modules of registered builders are imported.

    Args:
        named: names of options and values, from an untrusted message.

    Raises:
        SettingError: A setting, an option or a value is unknown, or a value has another type. A path of a callback is
            outside the run folder, or the engine is for simulations.
    """
    settings = resolve_settings(coordinator_registry(), named)
    for group in ("scenario", "strategy", "engine"):
        require(group in settings, group, "missing", "the name of an option", f"add {group} to the submission")
    _require_grid(settings["engine"])
    _require_paths_inside(settings.get(CALLBACKS) or {})
    _require_operator_variables(settings.get(CALLBACKS) or {})
    return config_from_dict(settings)


def check_submitted_settings(cfg: DictConfig) -> None:
    """Refuse settings of a resumed run that a submission could not have.

    Args:
        cfg: settings of the run folder, with the overrides of the submitter.

    Raises:
        SettingError: See `read_submitted_settings`. A value with a resolver, such as ``${oc.env:...}``, is refused too.
    """
    for name, value in _leaves(OmegaConf.to_container(cfg, resolve=False), ""):
        if isinstance(value, str) and "${" in REFERENCES.sub("", value):
            raise SettingError(name, value, "a value without a resolver", f"write the value of {name} itself")
    settings = config_to_dict(cfg, resolve_callbacks=True)
    read_submitted_settings(name_settings(coordinator_registry(), settings))


def _require_grid(engine: Mapping[str, Any]) -> None:
    grid = installed_registry().builders["engine"]["grid"]
    name = installed_registry().name_of("engine", engine["_target_"])
    require(engine["_target_"] == grid, "engine", name, "grid, the engine of a coordinator", "engine=grid")


def _require_paths_inside(callbacks: Mapping[str, Any]) -> None:
    for name, value in _leaves(callbacks, CALLBACKS):
        if isinstance(value, str) and not name.endswith("._target_") and _is_outside_folder(value):
            fix = assignment(name, PurePosixPath(value).name or "losses.csv")
            raise SettingError(name, value, "a name inside the run folder", fix)


def _require_operator_variables(callbacks: Mapping[str, Any]) -> None:
    """Refuse a callback that writes to a server or a place that the operator has not selected."""
    for name, node in callbacks.items():
        kind = find_target(node["_target_"], CALLBACKS) if node else Callback
        missing = [variable for variable in getattr(kind, "operator_variables", ()) if not os.environ.get(variable)]
        expected = f"null, because the operator of this coordinator has not set {', '.join(missing)}"
        require(not missing, f"{CALLBACKS}.{name}", "a callback", expected, assignment(f"{CALLBACKS}.{name}", None))


def _leaves(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each leaf of a tree. A key is a value too."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield name or "settings", key
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _leaves(value, f"{name}.{i}")
    else:
        yield name, node


def _is_outside_folder(value: str) -> bool:
    paths = (PurePosixPath(value), PureWindowsPath(value))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in paths) or value.startswith("~")
