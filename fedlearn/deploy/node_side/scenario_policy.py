"""Check the settings of a request: a node builds only the code, models and partitions that its policy names."""

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
DEFAULT_PARTITIONS = ("natural",)  # these leave each row at its client; a policy names any other


def scenario_problem(settings: Mapping[str, Any], bounds: Mapping[str, Any]) -> str | None:
    """Return why a node refuses the structure of a scenario's settings; None if it accepts them.

    Only the scenario, its model and its partition may name code, because any other name would run before the scenario
    is built. A partition other than ``natural`` and a model by ``_target_`` need a bound that lists them.

    Args:
        settings: of the request.
        bounds: of this scenario in the policy.
    """
    for path, key, _ in _walk(settings):
        if re.fullmatch(r"_\w+_", key) and key != "_target_":
            return f"{setting_path('scenario', path)} is no setting of a scenario"
        if key == "_target_" and path not in ("_target_", *(f"{group}._target_" for group in SCENARIO_GROUPS)):
            return f"{setting_path('scenario', path.removesuffix('._target_'))} has a _target_; expected a plain value"
    model, partition = settings.get("model"), choice(settings.get("partition"))
    if isinstance(model, Mapping) and "model" not in bounds:
        return f"model is {choice(model)}; this node accepts models by name, and those that its policy lists"
    if "partition" not in bounds and partition not in (None, *DEFAULT_PARTITIONS):
        return f"partition is {partition}; this node accepts one of {', '.join(DEFAULT_PARTITIONS)}"
    return None


def nested_code_problem(group: str, settings: Any, accepted: Collection[str] = ()) -> str | None:
    """Return why a node refuses code below a group's builder; None if there is none, or only accepted names.

    Args:
        group: of the request, e.g. ``strategy``.
        settings: of the group.
        accepted: dotted names that may stand below the builder, or prefixes that end with a dot.
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
    """Return the name by which a policy lists a model or a partition: an option, or a dotted name.

    >>> choice({"_target_": "fedlearn.data.partition.Dirichlet", "alpha": 0.1}), choice("mlp")
    ('dirichlet', 'mlp')
    """
    if value is None or isinstance(value, str):
        return value
    target = str(value.get("_target_")) if isinstance(value, Mapping) else str(value)
    return KIND_BY_TARGET.get(target, target)


def bounded_settings(settings: Mapping[str, Any], bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each bounded setting, by the name in the policy, e.g. ``partition.alpha``.

    A setting that the chosen kind of partition lacks has no value, so its bound does not apply.
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
    """Refuse a policy that bounds a setting by its old name.

    Raises:
        FedlearnError: the setting belongs to the partition now.
    """
    for name in bounds:
        new = new_name(f"scenario.{name}")
        if scenario.startswith("simulations.scenarios.") and new and new != name:
            raise FedlearnError(f"scenarios.{scenario}.{name} is called {new} now\n  try       {new}: ...")


def interpolation(node: Any, path: str = "") -> str | None:
    """Return the path of a text with ``${``, which would read the environment of the node; None if there is none."""
    if isinstance(node, str):
        return path if "${" in node else None
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    found = (
        interpolation(key, path) or interpolation(value, f"{path}.{key}" if path else str(key)) for key, value in items
    )
    return next(filter(None, found), None)


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        yield here, str(key), value
        yield from _walk(value, here)
