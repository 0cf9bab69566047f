"""Several inputs of one model in one NumPy array: named arrays, or a tuple of arrays.

A model with several inputs, such as token ids and a mask, gets a mapping or a tuple of arrays. `join_inputs` turns it
into one structured array with a record for each example. So `Examples.x` is always one array: indexing, slicing,
concatenation and digests need no other code. Trainers take the record apart with `split_inputs`, just before the model.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedlearn.errors import require

ADVICE = "x={'ids': ids, 'mask': mask}"


def join_inputs(x: Any) -> np.ndarray:
    """Return inputs as one array. A mapping or a tuple becomes a structured array with one field per input.

    Args:
        x: array ``(N, ...)``, a mapping from names to such arrays, or a tuple of two or more such arrays. The names
            are the arguments of the model. Arrays keep their types.

    Raises:
        SettingError: the arrays have different lengths, a name is no name of an argument, or there is no array.

    >>> x = join_inputs({"ids": np.arange(6).reshape(3, 2), "length": np.array([2.0, 1.0, 2.0], np.float32)})
    >>> x.shape, x.dtype.names, x[1:]["ids"].tolist()
    ((3,), ('ids', 'length'), [[2, 3], [4, 5]])
    """
    if not isinstance(x, Mapping | tuple):
        return np.asarray(x)
    pairs = x.items() if isinstance(x, Mapping) else ((str(number), part) for number, part in enumerate(x))
    arrays = {name: np.asarray(array) for name, array in pairs}
    _check(arrays, is_mapping=isinstance(x, Mapping))
    fields: list[Any] = [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()]
    joined = np.empty(len(next(iter(arrays.values()))), np.dtype(fields))
    for name, array in arrays.items():
        joined[name] = array
    return joined


def _check(arrays: Mapping[str, np.ndarray], *, is_mapping: bool) -> None:
    require(bool(arrays), "x", "no inputs", "one array or more", ADVICE)
    wrong = [name for name in arrays if is_mapping and not (isinstance(name, str) and name.isidentifier())]
    require(not wrong, "x", f"a mapping with the key {wrong[:1]}", "names of the arguments of the model", ADVICE)
    for name, array in arrays.items():
        value, expected = f"inputs {name!r} of {array.dtype} with shape {array.shape}", "an array of numbers per input"
        require(array.ndim > 0 and array.dtype.kind in "iufb", "x", value, expected, ADVICE)
    lengths = {name: len(array) for name, array in arrays.items()}
    shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
    is_equal = len(set(lengths.values())) == 1
    require(is_equal, "x", f"inputs with different numbers of examples ({shown})", "one number of examples", ADVICE)


def has_fields(x: Any) -> bool:
    """Return whether an array holds several inputs."""
    return getattr(getattr(x, "dtype", None), "names", None) is not None


def split_inputs(x: np.ndarray) -> Any:
    """Return the inputs of a model: an array, a mapping of arrays, or a tuple of arrays. Arrays are contiguous."""
    names = x.dtype.names
    if names is None:
        return x
    parts = {name: x[name].copy() for name in names}
    return tuple(parts.values()) if names[0].isdigit() else parts


def map_inputs(function: Callable[[Any], Any], x: Any) -> Any:
    """Apply a function to each array of the inputs of a model."""
    if isinstance(x, Mapping):
        return {name: function(part) for name, part in x.items()}
    return tuple(map(function, x)) if isinstance(x, tuple) else function(x)


def map_fields(function: Callable[..., np.ndarray], x: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Apply a function to each input in an array, and return one array again.

    Args:
        function: gets one input of each array, and returns an array.
        x: array of inputs.
        others: further arrays with the same inputs.
    """
    names = x.dtype.names
    if names is None:
        return function(x, *others)
    parts = {name: function(*(array[name].copy() for array in (x, *others))) for name in names}
    return join_inputs(tuple(parts.values()) if names[0].isdigit() else parts)


def input_arrays(x: Any) -> tuple[Any, ...]:
    """Return the arrays of the inputs of a model."""
    if has_fields(x):
        x = split_inputs(x)
    if isinstance(x, Mapping):
        return tuple(x.values())
    return x if isinstance(x, tuple) else (x,)


def call_with(function: Callable[..., Any], x: Any, **options: Any) -> Any:
    """Call a model: a mapping gives its arguments by name, a tuple by position, and an array is the only argument."""
    if isinstance(x, Mapping):
        return function(**x, **options)
    return function(*x, **options) if isinstance(x, tuple) else function(x, **options)


def describe_inputs(x: Any) -> str:
    """Return shapes and types of inputs, for errors, e.g. ``ids (5, 16) int64, mask (5, 16) bool``."""
    parts = split_inputs(x) if has_fields(x) else x
    if isinstance(parts, Mapping):
        return ", ".join(f"{name} {describe_inputs(part)}" for name, part in parts.items())
    if isinstance(parts, tuple):
        return ", ".join(f"{describe_inputs(part)}" for part in parts)
    return f"{tuple(parts.shape)} of {str(parts.dtype).removeprefix('torch.')}"
