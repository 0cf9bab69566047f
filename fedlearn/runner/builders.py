"""Which code a configuration may name, and with which settings.

A configuration names code (``_target_``), so it is treated as input that nobody has checked: only names below the
allowed modules are imported, and what they turn out to be must have been defined there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from fedlearn.core.import_path import require_not_shadowed, shadowing_folder
from fedlearn.errors import FedlearnError, SettingError, did_you_mean
from fedlearn.runner.renames import new_name

ALLOWED_MODULES = (
    "fedlearn",
    "strategies",
    "simulations",
    "flwr.serverapp.strategy",
)  # of Flower only what it aggregates by
SCENARIO_GROUPS = ("model", "partition")  # top-level groups that a scenario receives
FORBIDDEN_MODULES = ("fedlearn.runner.config", __name__)  # a configuration must not widen what configurations may do


class BuildError(FedlearnError):
    """Code that a configuration names failed; its own exception is the cause."""

    exit_code = 3


def check_targets(plain: Any, setting: str, *, allow: Sequence[str] = (), num_args: int | None = None) -> None:
    """Check every target of a tree: all names before the first import, then what each is and takes.

    Args:
        plain: a mapping with ``_target_``, as plain dicts and lists.
        setting: where it stands in the configuration, for messages.
        allow: modules besides `ALLOWED_MODULES`.
        num_args: positional arguments that the outermost target will get; None if not known yet.

    Raises:
        SettingError: a target is not allowed or not found, or a key is not one of its parameters.
        BuildError: a module failed while it was imported.
    """
    allow = (*ALLOWED_MODULES, *allow)
    targets = list(_targets(plain, setting))
    if not targets or targets[0][0] != setting:
        raise SettingError(
            setting, plain, "a mapping with a _target_ that names its builder", f"+{setting}._target_=..."
        )
    for where, node in targets:
        if not _below(node["_target_"], allow):
            raise _refused(where, node["_target_"], node["_target_"], allow)
    for where, node in targets:
        target = find_target(node["_target_"], where)
        home = getattr(target, "__module__", None)
        if not callable(target) or not _below(home, allow) or home in FORBIDDEN_MODULES:
            raise _refused(where, node["_target_"], home, allow)
        _check_parameters(target, node, where, num_args=num_args if where == setting else 0)


def setting_path(group: str, setting: str) -> str:
    """Return the name of a setting as a user types it: settings of the model and the partition are top-level.

    >>> setting_path("scenario", "path"), setting_path("scenario", "partition.alpha")
    ('scenario.path', 'partition.alpha')
    """
    return setting if group == "scenario" and setting.split(".")[0] in SCENARIO_GROUPS else f"{group}.{setting}"


def refuse_unknown_keys(settings: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise a `SettingError` for a key that is not among the known ones, naming the closest."""
    for key, value in settings.items():
        if key not in known:
            prefix = f"{where}." if where else ""
            closest = did_you_mean(key, known)
            near = new_name(f"{prefix}{key}") or (closest and f"{prefix}{closest}")
            fix = f"{near}={value}" if near else f"without {prefix}{key}"
            expected = f"one of {', '.join(known)}: there is no {key}" if known else f"no settings: there is no {key}"
            raise SettingError(f"{prefix}{key}", value, expected, fix)


def _targets(node: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from _targets(item, f"{where}.{i}")
    elif isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from _targets(value, setting_path(where, str(key)))


def _below(name: Any, allow: Sequence[str]) -> bool:
    return isinstance(name, str) and any(name == top or name.startswith(f"{top}.") for top in allow)


def _refused(where: str, name: Any, home: Any, allow: Sequence[str]) -> SettingError:
    expected = f"a builder from {', '.join(allow)}"
    seen = name if home in (name, None) else f"{name}   (from {home})"
    fix = f"'allow_targets=[{str(home).split('.')[0]}]'   (if you trust that code)"
    if _below(home, allow):
        fix = "one of the public builders"
    return SettingError(f"{where}._target_", seen, expected, fix)


def find_target(name: str, where: str) -> Any:
    """Return the object that a dotted name refers to; an attribute comes before a module of the same name."""
    first, *rest = name.split(".")
    require_not_shadowed(first)
    found = _imported(first, name, where)
    for i, part in enumerate(rest, start=2):
        if hasattr(found, part):
            found = getattr(found, part)
        elif hasattr(found, "__path__"):
            found = _imported(".".join(name.split(".")[:i]), name, where)
        else:
            near = did_you_mean(part, [public for public in dir(found) if not public.startswith("_")])
            meant = f": did you mean {near}?" if near else ""
            raise _not_found(name, where, f"{'.'.join(name.split('.')[: i - 1])} has no {part}{meant}")
    return found


def _imported(module: str, name: str, where: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # the module is there, but something that it needs is not
            raise BuildError(f"{where}._target_ {name} cannot be imported: {error}") from error
        raise _not_found(name, where, str(error)) from error
    except FedlearnError:
        raise
    except Exception as error:
        raise BuildError(f"{where}._target_ {name} cannot be imported: {type(error).__name__}: {error}") from error


def _not_found(name: str, where: str, why: str) -> SettingError:
    fix = "start from the folder that holds the module, and check the spelling"
    if mine := shadowing_folder(name.partition(".")[0]):
        why, fix = f"{why}; {mine} is not searched, as fedlearn has a package of this name", f"another name for {mine}"
    return SettingError(f"{where}._target_", name, f"a name that Python can import ({why})", fix)


def _check_parameters(target: Callable[..., Any], node: Mapping[str, Any], where: str, *, num_args: int | None) -> None:
    """Refuse keys that the target does not take; once ``num_args`` is known, also that one it needs is missing."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some extension types do not tell
        return
    given = {key: value for key, value in node.items() if not re.fullmatch(r"_\w+_", key)}
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = [p for p in by_name if p.kind is p.POSITIONAL_OR_KEYWORD][: num_args or 0]
    open_ = [p for p in by_name if p not in positional]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        refuse_unknown_keys(given, [p.name for p in open_], where)
    if num_args is None or node.get("_partial_") or "_args_" in node:
        return
    for name in (p.name for p in open_ if p.default is p.empty and p.name not in given):
        raise SettingError(
            f"{where}.{name}", "missing", f"a value: {node['_target_']} needs it", f"+{where}.{name}=..."
        )
