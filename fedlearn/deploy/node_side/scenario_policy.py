"""Check the settings of a request. A node builds only the code, models and partitions that its policy names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from fedlearn.data.partition import PARTITIONS
from fedlearn.errors import FedlearnError
from fedlearn.runner.builders import SCENARIO_GROUPS, setting_path
from fedlearn.runner.renames import new_name

KIND_BY_TARGET = {f"fedlearn.data.partition.{kind.__name__}": name for name, kind in PARTITIONS.items()}
DEFAULT_PARTITIONS = ("natural",)  # these do not move rows between clients; other partitions need a bound in the policy


def scenario_problem(settings: Mapping[str, Any], bounds: Mapping[str, Any]) -> str | None:
    """Return the reason to refuse the settings of a scenario; None to accept them.

    Only the scenario, its model and its partition may name code. Any other ``_target_`` would run before the scenario
    is built. A partition other than ``natural`` and a model with a ``_target_`` need a bound that lists them.

    Args:
        settings: settings of the scenario in the request.
        bounds: bounds of this scenario in the policy.
    """
    for path, key, _ in _walk(settings):
        if re.fullmatch(r"_\w+_", key) and key != "_target_":
            return f"{setting_path('scenario', path)} is not a setting of a scenario"
        if key == "_target_" and path not in ("_target_", *(f"{group}._target_" for group in SCENARIO_GROUPS)):
            return f"{setting_path('scenario', path.removesuffix('._target_'))} has a _target_; expected a plain value"
    model, partition = settings.get("model"), choice(settings.get("partition"))
    if isinstance(model, Mapping) and "model" not in bounds:
        return f"model is {choice(model)}; this node accepts models by name, and models in its policy"
    if "partition" not in bounds and partition not in (None, *DEFAULT_PARTITIONS):
        return f"partition is {partition}; this node accepts one of {', '.join(DEFAULT_PARTITIONS)}"
    return None


def nested_code_problem(group: str, settings: Any, accepted: Collection[str] = ()) -> str | None:
    """Return the reason to refuse code below the builder of a group; None to accept the settings.

    Args:
        group: group of settings in the request, e.g. ``strategy``.
        settings: settings of this group.
        accepted: dotted names that are accepted below the builder; a name that ends with a dot is a prefix.
    """
    for path, key, value in _walk(settings):
        if not re.fullmatch(r"_\w+_", key) or path == "_target_":
            continue
        prefixes = tuple(name for name in accepted if name.endswith("."))
        if key != "_target_" or not (value in accepted or str(value).startswith(prefixes or " ")):
            return f"{group}.{path} is {value}; this node accepts plain values below a builder"
    return None


def named_code(settings: Any) -> list[str]:
    """Return the dotted names of all builders in the settings of a group."""
    return [str(value) for _, key, value in _walk(settings) if key == "_target_"]


def choice(value: Any) -> Any:
    """Return the name of a model or partition in a policy: the name of an option, or a dotted name.

    >>> choice({"_target_": "fedlearn.data.partition.Dirichlet", "alpha": 0.1}), choice("mlp")
    ('dirichlet', 'mlp')
    """
    if value is None or isinstance(value, str):
        return value
    target = str(value.get("_target_")) if isinstance(value, Mapping) else str(value)
    return KIND_BY_TARGET.get(target, target)


def bounded_settings(settings: Mapping[str, Any], bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each bounded setting, by its name in the policy, e.g. ``partition.alpha``.

    A kind of partition may lack a setting. Then the setting has no value, and its bound does not apply.
    """
    values = {}
    for name in bounds:
        group, _, setting = name.partition(".")
        node = settings.get(group)
        if not setting:
            values[name] = choice(node) if group in SCENARIO_GROUPS else node
        elif not (kind := PARTITIONS.get(choice(node))) or setting in {field.name for field in fields(kind)}:
            values[name] = node.get(setting) if isinstance(node, Mapping) else None
    return values


def refuse_old_bounds(scenario: str, bounds: Mapping[str, Any]) -> None:
    """Refuse a policy that has the old name of a setting.

    Args:
        scenario: dotted name of the scenario.
        bounds: bounds of this scenario in the policy.

    Raises:
        FedlearnError: A bound has an old name; the message has the new name.
    """
    for name in bounds:
        new = new_name(f"scenario.{name}")
        if scenario.startswith("simulations.scenarios.") and new and new != name:
            raise FedlearnError(f"scenarios.{scenario}.{name} has the new name {new}\n  try       {new}: ...")


def interpolation(node: Any, path: str = "") -> str | None:
    """Return the path of the first text with ``${``, or None. Such a text could read the node's environment."""
    if isinstance(node, str):
        return path if "${" in node else None
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    paths = (
        interpolation(key, path) or interpolation(value, f"{path}.{key}" if path else str(key)) for key, value in items
    )
    return next(filter(None, paths), None)


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        child_path = f"{path}.{key}" if path else str(key)
        yield child_path, str(key), value
        yield from _walk(value, child_path)
