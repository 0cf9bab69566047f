"""Check submitted settings before the coordinator builds parts from them."""

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
REFERENCES = re.compile(r"\$\{[\w.]+\}")  # references to other settings of the run are safe


def check_submitted_settings(cfg: DictConfig) -> None:
    """Refuse settings that run code or read data of the coordinator without permission of its operator.

    A ``_target_`` must be an installed option, a strategy of Flower, or in a module of ``--allow-targets``. No value
    may call a resolver (``${oc.env:...}``). No value of a callback may be a path outside the run folder.

    Args:
        cfg: submitted settings.

    Raises:
        SettingError: A setting is refused.
    """
    settings = OmegaConf.to_container(cfg, resolve=False)
    allowed = allowed_by_operator()
    for name, value in _leaves(settings, ""):
        if isinstance(value, str) and "${" in REFERENCES.sub("", value):
            raise SettingError(name, value, "a value without a resolver", f"{name}=VALUE")
        if name.endswith("._target_"):
            _check_target(name, value, allowed)
        elif name.startswith("callbacks.") and isinstance(value, str) and _is_outside_folder(value):
            fix = f"{name}={PurePosixPath(value).name or 'losses.csv'}"
            raise SettingError(name, value, "a name inside the run folder", fix)
    _check_modules(settings, allowed)


def allowed_by_operator() -> tuple[str, ...]:
    """Return the modules that the operator of this coordinator allows."""
    return tuple(module for module in os.environ.get(ALLOW_ENV, "").split(",") if module)


def _check_modules(settings: Any, allowed: Sequence[str]) -> None:
    modules = settings.get("allow_targets") or []
    for module in modules if isinstance(modules, list) else [modules]:
        if not (isinstance(module, str) and _is_below(module, allowed)):
            raise _refusal("allow_targets", module, allowed, "'allow_targets=[]'")


def _check_target(name: str, target: Any, allowed: Sequence[str]) -> None:
    is_allowed = isinstance(target, str) and (
        target in _installed_targets() or _is_below(target, (*allowed, FLOWER_STRATEGIES))
    )
    if not is_allowed:
        raise _refusal(name, target, allowed, f"an installed option: {name.split('.')[0]}=...")


def _refusal(name: str, value: Any, allowed: Sequence[str], fix: str) -> SettingError:
    modules = f", or code in a module that the operator allows ({', '.join(allowed)})" if allowed else ""
    expected = f"an installed option{modules}; to allow more, the operator starts with --allow-targets MODULE"
    return SettingError(name, value, expected, fix)


@cache
def _installed_targets() -> frozenset[str]:
    texts = (path.read_text(encoding="utf-8") for path in CONF_DIR.rglob("*.yaml"))
    return frozenset(target for text in texts for target in re.findall(r"_target_:\s*([\w.]+)", text))


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


def _is_below(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _is_outside_folder(value: str) -> bool:
    paths = (PurePosixPath(value), PureWindowsPath(value))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in paths) or value.startswith("~")
