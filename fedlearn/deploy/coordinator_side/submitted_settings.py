"""Check the settings of a submitter, before the coordinator builds anything from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedlearn.deploy.coordinator import ALLOW_ENV
from fedlearn.errors import SettingError
from fedlearn.runner.compose import CONF_DIR

FLOWER_STRATEGIES = "flwr.serverapp.strategy"
REFERENCES = re.compile(r"\$\{[\w.]+\}")  # to other settings of the run: harmless


def check_submitted_settings(cfg: DictConfig) -> None:
    """Refuse settings that run code or read data of the coordinator without permission of its operator.

    A ``_target_`` is an installed option, a strategy of Flower, or lies in a module of ``--allow-targets``. No value
    calls a resolver (``${oc.env:...}``). No value of a callback is a path outside the run folder.

    Raises:
        SettingError: a setting is refused.
    """
    settings = OmegaConf.to_container(cfg, resolve=False)
    allowed = allowed_by_operator()
    for where, value in _leaves(settings, ""):
        if isinstance(value, str) and "${" in REFERENCES.sub("", value):
            raise SettingError(where, value, "a plain value: the coordinator resolves nothing", f"{where}=...")
        if where.endswith("._target_"):
            _check_target(where, value, allowed)
        elif where.startswith("callbacks.") and isinstance(value, str) and _leaves_folder(value):
            fix = f"{where}={PurePosixPath(value).name or 'losses.csv'}"
            raise SettingError(where, value, "a name inside the run folder", fix)
    _check_modules(settings, allowed)


def allowed_by_operator() -> tuple[str, ...]:
    """Return the modules that the operator of this coordinator allows."""
    return tuple(module for module in os.environ.get(ALLOW_ENV, "").split(",") if module)


def _check_modules(settings: Any, allowed: Sequence[str]) -> None:
    modules = settings.get("allow_targets") or []
    for module in modules if isinstance(modules, list) else [modules]:
        if not (isinstance(module, str) and _is_below(module, allowed)):
            raise _refused("allow_targets", module, allowed, "'allow_targets=[]'")


def _check_target(where: str, target: Any, allowed: Sequence[str]) -> None:
    known = isinstance(target, str) and (
        target in _installed_targets() or _is_below(target, (*allowed, FLOWER_STRATEGIES))
    )
    if not known:
        raise _refused(where, target, allowed, f"an installed option: {where.split('.')[0]}=...")


def _refused(where: str, value: Any, allowed: Sequence[str], fix: str) -> SettingError:
    also = f", or a module that the operator allows ({', '.join(allowed)})" if allowed else ""
    expected = f"an installed option{also}: the operator starts the coordinator with --allow-targets MODULE"
    return SettingError(where, value, expected, fix)


@cache
def _installed_targets() -> frozenset[str]:
    texts = (path.read_text(encoding="utf-8") for path in CONF_DIR.rglob("*.yaml"))
    return frozenset(target for text in texts for target in re.findall(r"_target_:\s*([\w.]+)", text))


def _leaves(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Return the dotted names and values of a tree; a key counts as a value, too."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield where or "settings", key
            yield from _leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _leaves(value, f"{where}.{i}")
    else:
        yield where, node


def _is_below(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _leaves_folder(value: str) -> bool:
    paths = (PurePosixPath(value), PureWindowsPath(value))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in paths) or value.startswith("~")
