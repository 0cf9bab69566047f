"""Decide whether the person who starts a command has allowed the modules of ``allow_targets``.

A configuration file or a run folder may come from another person. Its ``allow_targets`` alone permits nothing. The
person allows a module on the command line, in an environment variable, or by a module in the working folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedlearn.advice import assignment
from fedlearn.core.import_path import PACKAGES
from fedlearn.errors import SettingError, require
from fedlearn.runner.compat import HYDRA_PLUGINS

ACCEPTED_IN_HYDRA = {"_target_": (HYDRA_PLUGINS, "hydra_plugins."), "class": ("logging.",)}
ALLOW_ENV = "FEDLEARN_ALLOW_TARGETS"  # environment variable: modules, separated by commas


def allowed_by_environment() -> tuple[str, ...]:
    """Return the modules in the environment variable ``FEDLEARN_ALLOW_TARGETS``."""
    return tuple(module for module in os.environ.get(ALLOW_ENV, "").split(",") if module)


def listed_modules(settings: Mapping[str, Any] | DictConfig) -> list[str]:
    """Return the modules in ``allow_targets``; `fedlearn.runner.instantiation.allowed_modules` refuses other values."""
    modules = OmegaConf.to_container(OmegaConf.create({"modules": settings.get("allow_targets") or []}), resolve=True)
    listed = modules["modules"] if isinstance(modules, dict) else []
    return [str(module) for module in (listed if isinstance(listed, list) else [listed])]


def require_consent(modules: Sequence[str]) -> None:
    """Refuse modules of a file that the person who starts the command has not allowed.

    Args:
        modules: modules of ``allow_targets`` in a file. Those of a command line need no further consent.

    Raises:
        SettingError: A module is neither in the working folder nor in ``FEDLEARN_ALLOW_TARGETS``.
    """
    for module in modules:
        if not (module in allowed_by_environment() or _is_in_working_folder(module.partition(".")[0])):
            source = f"the command line or {ALLOW_ENV}={module} may allow others"
            expected = f"a module of the working folder, because this list is in a file; {source}"
            fix = assignment("allow_targets", [module])
            raise SettingError("allow_targets", module, expected, fix)


def refuse_packages(modules: Sequence[str]) -> None:
    """Refuse the packages of fedlearn in ``allow_targets``, because settings may name their builders only.

    Raises:
        SettingError: A module belongs to fedlearn.
    """
    for module in modules:
        is_own = module.partition(".")[0] not in PACKAGES
        expected = "your own modules; of fedlearn, settings may name the installed options and parts of a strategy"
        require(is_own, "allow_targets", module, expected, assignment("allow_targets", ["my_code"]))


def refuse_code_for_hydra(hydra: Any) -> None:
    """Refuse settings of Hydra that name code of other packages, or that set environment variables.

    Callbacks, launchers, sweepers and log handlers name code.

    Args:
        hydra: group ``hydra`` of a composed configuration, as plain values.

    Raises:
        SettingError: A setting names code outside Hydra, its installed plugins and Python's ``logging``, or sets an
            environment variable.
    """
    variables = ((hydra or {}).get("job") or {}).get("env_set")
    expected = "nothing, because a configuration file must not change the environment of the command"
    require(not variables, "hydra.job.env_set", variables, expected, "set environment variables before the command")
    for path, key, value in _entries(hydra, "hydra"):
        accepted = ACCEPTED_IN_HYDRA.get(key)
        is_code = key == "()" or (accepted is not None and not str(value).startswith(accepted))
        expected = "code of Hydra or of Python's logging, because a configuration file must not run other code"
        require(not is_code, path, value, expected, f"remove {path}")


def _entries(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield f"{path}.{key}", str(key), value
        yield from _entries(value, f"{path}.{key}")


def _is_in_working_folder(name: str) -> bool:
    """Return whether Python would import a top-level module from the working folder. Nothing is imported."""
    if name in sys.stdlib_module_names or name in sys.builtin_module_names:
        return False
    spec, folder = PathFinder.find_spec(name, [*sys.path, os.getcwd()]), Path.cwd()
    if spec is None:
        return False
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    module_files = {folder / f"{name}.py", folder / name / "__init__.py", folder / name}
    return bool(places) and {Path(place).resolve() for place in places if place} <= {
        path.resolve() for path in module_files
    }
