"""Pass objects between forked processes, with their arrays in shared memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np

ALIGNMENT = 64  # bytes; torch and NumPy then use the same vector instructions as for their own arrays
MIN_SHARED_BYTES = 4096  # smaller arrays go through the pipe


class SharedMessage(NamedTuple):
    """An object whose large arrays are in shared memory.

    Attributes:
        content: the object with a `_Place` for each of these arrays.
        end: first byte after the arrays.
    """

    content: Any
    end: int


class _Place(NamedTuple):
    """The place of an array in shared memory, and its form."""

    start: int
    size: int
    dtype: np.dtype
    shape: tuple[int, ...]


class SharedArrays:
    """Memory that a process and its later forks share. It grows on demand, and needs no pages until a write.

    Processes take turns: the reader has read a message before the writer overwrites it.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("fedlearn")
        self._memory: mmap.mmap | None = None

    def write(self, value: Any, *, start: int = 0) -> SharedMessage:
        """Write the arrays of records, mappings and lists from a byte on. Return the message for the reader."""
        arrays: list[tuple[_Place, np.ndarray]] = []
        end = start

        def place(array: Any) -> Any:
            nonlocal end
            if not isinstance(array, np.ndarray) or array.dtype.hasobject or array.nbytes < MIN_SHARED_BYTES:
                return array
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            end = begin + array.nbytes
            arrays.append((_Place(begin, array.nbytes, array.dtype, array.shape), array))
            return arrays[-1][0]

        content = _map_items(value, place)
        memory = self._bytes(end)
        for item, array in arrays:
            np.copyto(_array(memory, item), array)
        return SharedMessage(content, end)

    def read(self, message: SharedMessage, *, copy: bool = False) -> tuple[Any, np.ndarray]:
        """Return the object of a message, and an array that lives as long as an array of the object.

        Args:
            message: message of `write`.
            copy: True copies the arrays; the memory is then free for the next message.
        """
        memory = self._bytes(message.end)

        def array_at(item: Any) -> Any:
            if not isinstance(item, _Place):
                return item
            return _array(memory, item).copy() if copy else _array(memory, item)

        return _map_items(message.content, array_at), memory

    def close(self) -> None:
        """Close the file. The memory is released with the last array in it."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._memory = -1, None

    def _bytes(self, size: int) -> np.ndarray:
        """Return at least this many bytes of the memory, as a new array."""
        if self._memory is None or size > len(self._memory):
            needed = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
            if needed > os.fstat(self._file).st_size:
                os.ftruncate(self._file, needed)
            self._memory = mmap.mmap(self._file, needed)
        return np.frombuffer(self._memory, np.uint8)


def _array(memory: np.ndarray, place: _Place) -> np.ndarray:
    """Return the array at a place, as a view of the memory."""
    return memory[place.start : place.start + place.size].view(place.dtype).reshape(place.shape)


def _map_items(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return records, mappings, lists and tuples with a function of each item that is none of them."""
    if isinstance(value, _Place):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: _map_items(getattr(value, field.name), function) for field in fields(value)}
        )
    if isinstance(value, Mapping):
        return {name: _map_items(item, function) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return getattr(value, "_make", type(value))([_map_items(item, function) for item in value])
    return function(value)
