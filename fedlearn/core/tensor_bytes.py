"""Write and read the bytes of a safetensors file in parts, without a copy of its arrays.

The library safetensors needs a whole payload in memory beside its arrays. A large model would then be there twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

Buffer = bytes | bytearray | memoryview
LENGTH_BYTES = 8  # a file starts with the length of its header, which is a multiple of this number
METADATA = "__metadata__"
DTYPES = {  # dtype -> name in the format, in the order of the arrays in a file
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
DTYPE_OF_NAME = {name: np.dtype(dtype) for dtype, name in DTYPES.items()}


def tensor_parts(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> list[Buffer]:
    """Return a safetensors file in parts: its header, then each array without a copy.

    >>> b"".join(tensor_parts({"a": np.zeros(1)}, {}))[-8:]
    b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00'

    Raises:
        TypeError: The format does not have the dtype of an array.
    """
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise TypeError(f"the array {name} has dtype {array.dtype}, expected one of {', '.join(DTYPES)}")
    specs = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    little = (np.ascontiguousarray(arrays[name], arrays[name].dtype.newbyteorder("<")) for name in _ordered(specs))
    return [tensor_header(specs, metadata), *(array.reshape(-1).view(np.uint8).data for array in little)]


def tensor_header(specs: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Return the first bytes of a safetensors file, up to the bytes of its first array.

    Args:
        specs: name of each array -> dtype and shape.
        metadata: texts by name.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name in _ordered(specs):
        dtype, shape = specs[name]
        end = start + np.dtype(dtype).itemsize * prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _ordered(specs: Mapping[str, tuple[str, Sequence[int]]]) -> list[str]:
    """Return the names in the order of a file."""
    order = list(DTYPES)
    return sorted(specs, key=lambda name: (order.index(specs[name][0]), name))


def read_tensors(data: memoryview, header: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file as views of its bytes.

    An array is copied if its bytes are read-only, or do not start at a multiple of its item size.

    Args:
        data: bytes after the header; untrusted.
        header: parsed header; untrusted.

    Raises:
        ValueError: The header is malformed, or its arrays do not cover the bytes without gaps and overlaps.
    """
    arrays, ends = {}, 0
    entries = [_read_entry(name, entry) for name, entry in header.items() if name != METADATA]
    for name, dtype, shape, start, end in sorted(entries, key=lambda entry: entry[3:]):
        if start != ends or end - start != dtype.itemsize * prod(shape) or end > len(data):
            raise ValueError(f"the array {name} has the bytes {start} to {end}, which do not fit its shape")
        array = np.frombuffer(data[start:end], dtype)
        if not (array.flags.aligned and array.flags.writeable):
            array = array.copy()
        arrays[name], ends = array.reshape(shape), end
    if ends != len(data):
        raise ValueError(f"the arrays have {ends} bytes, expected {len(data)}")
    return {name: arrays[name] for name in sorted(arrays)}


def _read_entry(name: str, entry: Any) -> tuple[str, np.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the header of the array {name} is malformed")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise ValueError(f"the header of the array {name} is malformed")
    return name, DTYPE_OF_NAME[entry["dtype"]], tuple(shape), offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def num_bytes(parts: Iterable[Buffer]) -> int:
    """Return the number of bytes of several parts."""
    return sum(len(part) for part in parts)


def join(parts: Sequence[Buffer]) -> Buffer:
    """Return the bytes of several parts; a single part is not copied."""
    return parts[0] if len(parts) == 1 else b"".join(parts)
