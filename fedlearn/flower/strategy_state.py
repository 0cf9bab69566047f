"""Save the attributes of a Flower strategy as named arrays, which a checkpoint can hold.

Flower strategies are mutable objects: FedAdam keeps ``m_t`` and ``v_t``, FedAvgM a ``momentum_vector``. Their
attributes are compared before and after a round. Supported types are arrays, records, numbers, strings, and lists and
dicts of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import copy
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from fedlearn.core.records import State

RECORD_TYPES: Mapping[str, Any] = {
    "ArrayRecord": ArrayRecord,
    "MetricRecord": MetricRecord,
    "ConfigRecord": ConfigRecord,
}
PLAN = "plan"  # structure of the attributes and their arrays: JSON as bytes


class UnsupportedValueError(TypeError):
    """Report a value that cannot be saved as arrays."""


class Snapshot(NamedTuple):
    """Hold the attributes of an object at one moment.

    Attributes:
        plan: structure of each supported attribute, with the paths of its arrays.
        arrays: arrays of the attributes, by path.
        unsupported: attributes of other types.
    """

    plan: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    unsupported: Mapping[str, Any]

    def changes_since(self, before: Snapshot) -> tuple[State, tuple[str, ...]]:
        """Return the changed attributes as named arrays, and the names of changed attributes of unsupported types.

        An attribute of an unsupported type counts as unchanged if it is the same object.

        Args:
            before: earlier snapshot of the same object.
        """
        changed = {
            name: part for name, part in self.plan.items() if part != before.plan.get(name, ...) or _has_arrays(part)
        }
        arrays = {path: array for path, array in self.arrays.items() if path.partition("/")[0] in changed}
        unsupported = [name for name, value in self.unsupported.items() if value is not before.unsupported.get(name)]
        return {**arrays, PLAN: np.frombuffer(json.dumps(changed).encode(), np.uint8)}, tuple(sorted(unsupported))


def take_snapshot(strategy: Any) -> Snapshot:
    """Return a snapshot of the current attributes of a strategy."""
    plan: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    unsupported = {}
    for name, value in vars(strategy).items():
        parts: dict[str, np.ndarray] = {}
        try:
            plan[name] = _disassemble(value, name, parts)
            arrays |= parts
        except UnsupportedValueError:
            unsupported[name] = value
    return Snapshot(plan, arrays, unsupported)


def restore(strategy: Any, first: Snapshot, state: State) -> Any:
    """Return a strategy with its initial attributes and saved changes. It shares nothing with the original.

    Args:
        strategy: the original, which is not changed.
        first: snapshot of the original before round 1.
        state: saved changes, from `Snapshot.changes_since`; empty before round 1.
    """
    restored = copy(strategy)
    changes = json.loads(np.asarray(state[PLAN]).tobytes()) if PLAN in state else {}
    for plan, arrays in ((first.plan, first.arrays), (changes, state)):
        for name, part in plan.items():
            setattr(restored, name, _assemble(part, arrays))
    return restored


def _has_arrays(part: Any) -> bool:
    """Return True if a plan has arrays. Arrays are not compared, so they count as changed."""
    return isinstance(part, dict) and '"array"' in json.dumps(part).lower()


def _disassemble(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """Return the structure of a value; add its arrays to ``arrays``, each under its path."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        arrays[path] = np.asarray(value)
        return {"array": path}
    if isinstance(value, Array):
        arrays[path] = value.numpy()
        return {"Array": path}
    for name, kind in {**RECORD_TYPES, "dict": dict}.items():
        if isinstance(value, kind) and all(isinstance(key, str) for key in value):
            return {name: {key: _disassemble(item, f"{path}/{key}", arrays) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_disassemble(item, f"{path}/{i}", arrays) for i, item in enumerate(value)]}
    raise UnsupportedValueError(path)


def _assemble(part: Any, arrays: Mapping[str, Any]) -> Any:
    if not isinstance(part, dict):
        return part
    ((kind, inside),) = part.items()
    if kind in ("array", "Array"):
        array = np.array(arrays[inside])
        return Array(array) if kind == "Array" else array
    if kind in ("list", "tuple"):
        items = [_assemble(item, arrays) for item in inside]
        return tuple(items) if kind == "tuple" else items
    entries = {key: _assemble(item, arrays) for key, item in inside.items()}
    return RECORD_TYPES[kind](entries) if kind in RECORD_TYPES else entries
