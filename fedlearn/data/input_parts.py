"""Describe the inputs of a model with several inputs, in the files of a trained model.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlearn.core.inputs import has_fields, input_arrays, join_inputs
from fedlearn.errors import DataError, SettingError

TYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")
MAX_PARTS, MAX_SIZE = 64, 2**31


@dataclass(frozen=True, kw_only=True)
class InputPart:
    """Shape of one example, and type, of one of several inputs."""

    shape: tuple[int, ...]
    dtype: str


Parts = Mapping[str, InputPart]  # name of an argument of the model, or its position from "0"


def parts_of(x: np.ndarray) -> dict[str, InputPart]:
    """Return the parts of an array of inputs; empty for one input."""
    names = x.dtype.names or ()
    return {name: InputPart(shape=x.dtype[name].shape, dtype=x.dtype[name].base.name) for name in names}


def parts_to_json(parts: Parts) -> dict[str, Any]:
    """Return the parts as JSON values."""
    return {name: [list(part.shape), part.dtype] for name, part in parts.items()}


def parts_from_json(content: Any) -> dict[str, InputPart]:
    """Return the parts from JSON values of a file, which can come from another party.

    Raises:
        ValueError: A name, a shape or a type is not valid.
    """
    if not isinstance(content, dict) or len(content) > MAX_PARTS:
        raise ValueError("the inputs are not a mapping")
    parts = {}
    for name, (shape, dtype) in content.items():
        is_shape = isinstance(shape, list) and all(type(size) is int and 0 <= size < MAX_SIZE for size in shape)
        if not (name.isidentifier() or name.isdigit()) or not is_shape or dtype not in TYPES:
            raise ValueError(f"the input {name[:40]!r} is not valid")
        parts[name] = InputPart(shape=tuple(shape), dtype=dtype)
    return parts


def join_parts(data: Any, parts: Parts) -> np.ndarray:
    """Return examples for a model with these parts, ``(N,)``.

    Args:
        data: mapping or tuple of arrays, or a structured array of them.
        parts: inputs of the model.

    Raises:
        DataError: Names or shapes differ, or a value is not finite.
    """
    wanted = ", ".join(f"{name} {part.shape} {part.dtype}" for name, part in parts.items())
    advice = f"  expected  {wanted}, each with a first axis of examples\n  advice    model.predict({_example(parts)})"
    try:
        x = join_inputs(data)
    except SettingError as error:
        raise DataError(f"the examples cannot be read: {str(error).splitlines()[0]}\n{advice}") from error
    if not has_fields(x) or set(x.dtype.names or ()) != set(parts):
        raise DataError(f"the examples have the inputs {', '.join(x.dtype.names or ('one array',))}\n{advice}")
    for name, part in parts.items():
        if x[name].shape[1:] != part.shape:
            raise DataError(f"the input {name} has examples of shape {x[name].shape[1:]}\n{advice}")
    if not all(np.isfinite(array).all() for array in input_arrays(x)):
        raise DataError(f"an input has a value that is missing or not finite\n{advice}")
    arrays = {name: x[name].astype(part.dtype) for name, part in parts.items()}
    return join_inputs(tuple(arrays.values()) if next(iter(arrays)).isdigit() else arrays)


def _example(parts: Parts) -> str:
    if next(iter(parts)).isdigit():
        return f"({', '.join(f'x{name}' for name in parts)})"
    return "{" + ", ".join(f"{name!r}: {name}" for name in parts) + "}"
