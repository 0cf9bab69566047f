"""What a Flower strategy remembers from round to round, as named arrays that a checkpoint can hold.

Flower's strategies are objects that change: FedAdam keeps ``m_t`` and ``v_t``, FedAvgM a ``momentum_vector``. Their
attributes are read before and after a round; arrays, records, numbers, words and lists and dicts of these can be kept.
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
PLAN = "plan"  # how the named arrays are put together again: JSON as bytes


class UnsupportedValueError(TypeError):
    """A value that cannot be kept as arrays."""


class Snapshot(NamedTuple):
    """The attributes of an object at one moment.

    Attributes:
        plan: of each that can be kept, how it is made of arrays.
        arrays: those, by path.
        unsupported: attributes that cannot be kept.
    """

    plan: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    unsupported: Mapping[str, Any]

    def changes_since(self, before: Snapshot) -> tuple[State, tuple[str, ...]]:
        """What has changed, as named arrays; and the names of what has changed but cannot be kept.

        An object of a kind that cannot be kept is taken for unchanged as long as it is the same object.
        """
        new = {name: part for name, part in self.plan.items() if part != before.plan.get(name, ...) or _holds(part)}
        arrays = {path: array for path, array in self.arrays.items() if path.partition("/")[0] in new}
        lost = [name for name, value in self.unsupported.items() if value is not before.unsupported.get(name)]
        return {**arrays, PLAN: np.frombuffer(json.dumps(new).encode(), np.uint8)}, tuple(sorted(lost))


def take_snapshot(strategy: Any) -> Snapshot:
    """The attributes of a strategy as they are now."""
    plan: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    others = {}
    for name, value in vars(strategy).items():
        found: dict[str, np.ndarray] = {}
        try:
            plan[name] = _taken_apart(value, name, found)
            arrays |= found
        except UnsupportedValueError:
            others[name] = value
    return Snapshot(plan, arrays, others)


def restore(strategy: Any, first: Snapshot, state: State) -> Any:
    """A copy of a strategy as it was first, with what it has remembered since; nothing is shared with the original."""
    own = copy(strategy)
    remembered = json.loads(np.asarray(state[PLAN]).tobytes()) if PLAN in state else {}
    for plan, arrays in ((first.plan, first.arrays), (remembered, state)):
        for name, part in plan.items():
            setattr(own, name, _put_together(part, arrays))
    return own


def _holds(part: Any) -> bool:
    """Whether a plan is one of arrays, which are not compared."""
    return isinstance(part, dict) and '"array"' in json.dumps(part).lower()


def _taken_apart(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """A plan of the value; its arrays go into ``arrays``, each under its path."""
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
            return {name: {key: _taken_apart(one, f"{path}/{key}", arrays) for key, one in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_taken_apart(one, f"{path}/{i}", arrays) for i, one in enumerate(value)]}
    raise UnsupportedValueError(path)


def _put_together(part: Any, arrays: Mapping[str, Any]) -> Any:
    if not isinstance(part, dict):
        return part
    ((kind, inside),) = part.items()
    if kind in ("array", "Array"):
        array = np.array(arrays[inside])
        return Array(array) if kind == "Array" else array
    if kind in ("list", "tuple"):
        whole = [_put_together(one, arrays) for one in inside]
        return tuple(whole) if kind == "tuple" else whole
    made = {key: _put_together(one, arrays) for key, one in inside.items()}
    return RECORD_TYPES[kind](made) if kind in RECORD_TYPES else made
