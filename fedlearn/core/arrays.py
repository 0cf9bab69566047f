"""Convert arrays between NumPy and the array libraries of the frameworks, on any device."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from array_api_compat import array_namespace, to_device

BLOCK_SIZE = 2**20  # numbers that are checked at a time


def _load_numpy_namespace() -> None:
    """Load the array API of NumPy without ``numpy.f2py``. It would take 0.09 s at the start of each command."""
    is_absent = "f2py" not in vars(np)
    if is_absent:
        vars(np)["f2py"] = None  # ``from numpy import *`` imports each public module that is not an attribute yet
    try:
        import_module("array_api_compat.numpy")
    finally:
        if is_absent:
            del vars(np)["f2py"]


_load_numpy_namespace()


def as_numpy(array: Any) -> np.ndarray:
    """Return the array as NumPy in main memory. An array in main memory is not copied."""
    if isinstance(array, np.ndarray | np.generic) or not hasattr(array, "device"):
        return np.asarray(array)
    return np.asarray(to_device(array, "cpu") if hasattr(array, "cpu") else array)


def asarray_like(array: Any, reference: Any) -> Any:
    """Return ``array`` in the library and on the device of ``reference``.

    States from a checkpoint are NumPy arrays, also if training uses another library.
    """
    if isinstance(array, type(reference)):
        return array
    return array_namespace(reference).asarray(as_numpy(array), device=reference.device)


def is_finite(array: np.ndarray) -> bool:
    """Return whether no number is NaN or infinite. Large arrays are checked in blocks, with little memory.

    >>> is_finite(np.ones(3)), is_finite(np.array([1.0, np.inf]))
    (True, False)
    """
    flat = array.reshape(-1)
    starts = range(0, len(flat), BLOCK_SIZE)
    return all(bool(np.isfinite(flat[start : start + BLOCK_SIZE]).all()) for start in starts)


def log_softmax(logits: Any) -> Any:
    """Return the logarithm of the softmax over the last axis, for arrays of any library."""
    xp = array_namespace(logits)
    shifted = logits - xp.max(logits, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def holds_whole_numbers(array: np.ndarray) -> bool:
    """Return whether all values are whole numbers, such as tokens. Scenarios may keep tokens as floating-point numbers.

    >>> holds_whole_numbers(np.array([3.0, 7.0])), holds_whole_numbers(np.array([3.0, 0.5]))
    (True, False)
    """
    return not np.issubdtype(array.dtype, np.floating) or bool(np.array_equal(array, np.rint(array)))
