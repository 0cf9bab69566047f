"""Build the settings of local training from a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fedlearn.core.import_path import PACKAGES
from fedlearn.core.records import LocalSettings
from fedlearn.errors import SettingError, require
from fedlearn.runner.builders import find_target, is_in_modules, refuse_unknown_keys

FUNCTIONS = ("optimizer", "schedule")  # settings that may name code
OPTIMIZER_OF_FRAMEWORK = re.compile(r"(torch\.optim|optax)\.[A-Za-z]\w*", re.ASCII)
EXAMPLES = {"optimizer": "adam", "schedule": "cosine"}


def build_local(settings: Mapping[str, Any], *, allow: Sequence[str]) -> LocalSettings:
    """Return the settings of local training. A ``_target_`` becomes a function.

    Only ``privacy=example`` sets DP-SGD, because it accounts for it.

    Args:
        settings: group ``local`` of the configuration, as plain values.
        allow: modules that the user allows.

    Raises:
        SettingError: A setting is unknown or out of range, or a ``_target_`` is not allowed.
    """
    example_dp = settings.get("example_dp")
    require(example_dp is None, "local.example_dp", example_dp, "null", "privacy=example privacy.clip=1.0")
    refuse_unknown_keys(settings, list(LocalSettings.__dataclass_fields__), "local")
    targets = {name: _target_of(settings.get(name)) for name in FUNCTIONS}
    functions = {name: _function(name, node, allow) for name, node in targets.items() if node is not None}
    try:
        return LocalSettings(**{**settings, **functions})
    except SettingError as error:
        raise error.with_prefix("local") from None


def _target_of(value: Any) -> Mapping[str, Any] | None:
    """Return the mapping with ``_target_``; also for a name with a dot. None for other values."""
    if isinstance(value, str) and "." in value:
        return {"_target_": value}
    return value if isinstance(value, Mapping) and "_target_" in value else None


def _function(name: str, node: Mapping[str, Any], allow: Sequence[str]) -> Any:
    """Return the function that a ``_target_`` names, with the other keys as its arguments.

    Raises:
        SettingError: The name is neither an optimizer of a framework nor in an allowed module.
    """
    setting, target = f"local.{name}", node["_target_"]
    is_framework = name == "optimizer" and isinstance(target, str) and OPTIMIZER_OF_FRAMEWORK.fullmatch(target)
    if not (is_framework or is_in_modules(target, allow)):
        raise _refused(setting, target)
    function = find_target(target, f"{setting}._target_")
    home = getattr(function, "__module__", None)
    if not callable(function) or not (is_framework or is_in_modules(home, allow)):
        raise _refused(setting, target)
    values = {key: value for key, value in node.items() if key != "_target_"}
    return partial(function, **values) if values else function


def _refused(setting: str, target: Any) -> SettingError:
    module = str(target).partition(".")[0]
    expected = "an optimizer of torch.optim or optax, or a function of an allowed module"
    fix = f"'allow_targets=[{module}]'   (if you trust this module)"
    if module in (*PACKAGES, "torch", "optax", "jax") or not re.fullmatch(r"[A-Za-z_]\w*", module):
        fix = f"{setting}={EXAMPLES[setting.partition('.')[2]]}"
    return SettingError(f"{setting}._target_", target, expected, fix)
