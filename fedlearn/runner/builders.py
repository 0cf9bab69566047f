"""Check the code that a configuration names, and its settings.

A configuration names code (``_target_``), so it is untrusted input. It may name the builders of the installed options,
the documented parts of a strategy, and objects of modules that the user allows. Such an object must be defined in an
allowed module, because modules also have names that they have imported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from fedlearn.advice import assignment
from fedlearn.core.import_path import PACKAGES, require_not_shadowed, shadowing_folder
from fedlearn.errors import FedlearnError, SettingError, did_you_mean
from fedlearn.runner.conf_files import installed_options
from fedlearn.runner.renames import new_name

SCENARIO_GROUPS = ("model", "partition")  # top-level groups that a scenario receives
FLOWER_STRATEGY = re.compile(r"flwr\.serverapp\.strategy\.[A-Z]\w*", re.ASCII)
NESTED_GROUPS = {"model": "model", "partition": "partition", "rule": "strategy"}  # setting -> group of its options
STRATEGY_PARTS = frozenset(  # documented parts: a configuration may compose a strategy from them
    f"{namespace}.{name}"
    for namespace in ("fedlearn", "fedlearn.algorithm")
    for name in (
        "Aggregator",
        "LocalRule",
        "Selector",
        "Stage",
        "Strategy",
        "Transform",
        "adaptive",
        "chain",
        "clip",
        "everyone",
        "expected_mean",
        "mean",
        "poisson",
        "proximal",
        "sgd",
        "stacked",
        "uniform",
    )
)


class BuildError(FedlearnError):
    """Report that code which a configuration names failed. ``__cause__`` is the exception of this code."""

    exit_code = 3


def check_targets(plain: Any, setting: str, *, allow: Sequence[str] = (), num_args: int | None = None) -> None:
    """Check every ``_target_`` of a tree: all names before the first import, then objects and parameters.

    Args:
        plain: mapping with ``_target_``, in plain dicts and lists.
        setting: name of the mapping in the configuration, for error texts. Its first part is the group, whose options
            the mapping may name.
        allow: modules besides the library that the user allows.
        num_args: number of positional arguments that the outermost target will receive; None if it is not yet known.

    Raises:
        SettingError: a target is not allowed or does not exist, or a key is not one of its parameters.
        BuildError: the import of a module failed.

    Guarantees: if one name is not allowed, no module is imported.
    """
    _refuse_interpolations(plain, setting)
    targets = list(_targets(plain, setting))
    if not targets or targets[0][0] != setting:
        raise SettingError(
            setting,
            plain,
            "a mapping whose _target_ is the name of a builder",
            f"name the builder in {setting}._target_",
        )
    for path, node in targets:
        name = node["_target_"]
        if not (is_library_builder(name, _group_at(path, setting)) or is_in_modules(name, allow)):
            raise _refused(path, name, name, allow)
    for path, node in targets:
        target = find_target(node["_target_"], path)
        home = getattr(target, "__module__", None)
        is_known = is_library_builder(node["_target_"], _group_at(path, setting))
        if not callable(target) or not (is_known or is_in_modules(home, allow)):
            raise _refused(path, node["_target_"], home, allow)
        _check_parameters(target, node, path, num_args=num_args if path == setting else 0)


def is_library_builder(name: Any, group: str | None) -> bool:
    """Return whether a dotted name is the builder of an installed option of this group, or a part of a strategy."""
    if not isinstance(name, str):
        return False
    options = installed_options().get(group or "", {})
    is_option = any(isinstance(option, dict) and option["_target_"] == name for option in options.values())
    return is_option or name in STRATEGY_PARTS or (group == "flower" and FLOWER_STRATEGY.fullmatch(name) is not None)


def _group_at(path: str, setting: str) -> str | None:
    """Return the group whose options may stand at a place of the configuration; None: parts of a strategy only."""
    if path == setting:
        return setting.partition(".")[0]
    last = path.rpartition(".")[2]
    return "flower" if last == "flower" else NESTED_GROUPS.get(last)


def setting_path(group: str, setting: str) -> str:
    """Return the name of a setting as a user types it: settings of the model and the partition are top-level.

    >>> setting_path("scenario", "path"), setting_path("scenario", "partition.alpha")
    ('scenario.path', 'partition.alpha')
    """
    return setting if group == "scenario" and setting.split(".")[0] in SCENARIO_GROUPS else f"{group}.{setting}"


def refuse_unknown_keys(settings: Mapping[str, Any], known: Sequence[str], group: str) -> None:
    """Refuse settings with an unknown key, and suggest the closest known key.

    Args:
        settings: key -> value.
        known: known keys.
        group: name of their group; empty for top-level settings.

    Raises:
        SettingError: a key is not among the known keys.
    """
    for key, value in settings.items():
        if key not in known:
            prefix = f"{group}." if group else ""
            closest = did_you_mean(key, known)
            near = new_name(f"{prefix}{key}") or (closest and f"{prefix}{closest}")
            fix = assignment(near, value) if near else f"remove {prefix}{key}"
            expected = f"one of {', '.join(known)}; there is no {key}" if known else f"no setting; there is no {key}"
            raise SettingError(f"{prefix}{key}", value, expected, fix)


def _targets(node: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield from _targets(item, f"{path}.{i}")
    elif isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _targets(value, setting_path(path, str(key)))


def _refuse_interpolations(node: Any, path: str) -> None:
    """Refuse a text that Hydra would resolve again during the construction, e.g. to a ``_target_`` without a check."""
    if isinstance(node, str) and "${" in node:
        raise SettingError(
            path,
            node,
            "a value; its references are resolved once, before this check",
            f"write the value of {path} itself",
        )
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        _refuse_interpolations(key, path)
        _refuse_interpolations(value, setting_path(path, str(key)))


def is_in_modules(name: Any, allow: Sequence[str]) -> bool:
    """Return whether a dotted name is one of these modules, or belongs to one of them."""
    return isinstance(name, str) and any(name == top or name.startswith(f"{top}.") for top in allow)


def _refused(setting: str, name: Any, home: Any, allow: Sequence[str]) -> SettingError:
    modules = f", or a builder from {', '.join(allow)}" if allow else ""
    expected = f"an installed option, a part of a strategy{modules or ', or a module that you trust'}"
    value = name if home in (name, None) else f"{name}   (from {home})"
    module = str(home).split(".")[0]
    fix = assignment("allow_targets", [module])
    if folder := shadowing_folder(str(name).partition(".")[0]):
        expected += f"; {folder} is not searched, because fedlearn has a package of this name"
        fix = f"rename {folder}"
    elif module in (*PACKAGES, "flwr") or is_in_modules(home, allow):
        fix = _close_builder(str(name), setting) or f"remove {setting}._target_"
    return SettingError(f"{setting}._target_", value, expected, fix)


def _close_builder(name: str, setting: str) -> str | None:
    options = (
        option for group in installed_options().values() for option in group.values() if isinstance(option, dict)
    )
    close = did_you_mean(name, [*(option["_target_"] for option in options), *sorted(STRATEGY_PARTS)])
    return close and assignment(f"{setting}._target_", close)


def find_target(name: str, setting: str) -> Any:
    """Return the object with this dotted name. An attribute has priority over a module of the same name.

    Raises:
        SettingError: the name does not exist.
        BuildError: the import of a module failed.
    """
    first, *rest = name.split(".")
    require_not_shadowed(first)
    target = _import(first, name, setting)
    for i, part in enumerate(rest, start=2):
        if hasattr(target, part):
            target = getattr(target, part)
        elif hasattr(target, "__path__"):
            target = _import(".".join(name.split(".")[:i]), name, setting)
        else:
            near = did_you_mean(part, [public for public in dir(target) if not public.startswith("_")])
            suggestion = f": did you mean {near}?" if near else ""
            raise _not_found(name, setting, f"{'.'.join(name.split('.')[: i - 1])} has no {part}{suggestion}")
    return target


def _import(module: str, name: str, setting: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # the module exists, but one of its own imports does not
            raise BuildError(f"{setting}._target_ {name} cannot be imported: {error}") from error
        raise _not_found(name, setting, str(error)) from error
    except FedlearnError:
        raise
    except Exception as error:
        raise BuildError(f"{setting}._target_ {name} cannot be imported: {type(error).__name__}: {error}") from error


def _not_found(name: str, setting: str, reason: str) -> SettingError:
    fix = "start from the folder that contains the module, and check the spelling"
    if folder := shadowing_folder(name.partition(".")[0]):
        reason = f"{reason}; {folder} is not searched, because fedlearn has a package of this name"
        fix = f"rename {folder}"
    return SettingError(f"{setting}._target_", name, f"a name that Python can import ({reason})", fix)


def _check_parameters(
    target: Callable[..., Any], node: Mapping[str, Any], setting: str, *, num_args: int | None
) -> None:
    """Refuse keys that are no parameters of the target. If ``num_args`` is known, require all parameters, too."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some extension types have no signature
        return
    settings = {key: value for key, value in node.items() if not re.fullmatch(r"_\w+_", key)}
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = [p for p in by_name if p.kind is p.POSITIONAL_OR_KEYWORD][: num_args or 0]
    open_ = [p for p in by_name if p not in positional]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        refuse_unknown_keys(settings, [p.name for p in open_], setting)
    if num_args is None or node.get("_partial_") or "_args_" in node:
        return
    for name in (p.name for p in open_ if p.default is p.empty and p.name not in settings):
        raise SettingError(
            f"{setting}.{name}",
            "missing",
            f"a value, which {node['_target_']} requires",
            f"add +{setting}.{name} with a value",
        )
