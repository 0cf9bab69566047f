"""Serialize arrays and JSON metadata as safetensors: the format of messages and checkpoints.

Shapes: D parameters.

Nothing in a payload is executed. Reading untrusted bytes returns a `Payload` or raises `WireError`. The work is linear
in the number of bytes, and JSON is limited in size, depth and range.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedlearn.core.arrays import as_numpy, is_finite
from fedlearn.core.plain_text import plain_line
from fedlearn.core.tensor_bytes import LENGTH_BYTES, Buffer, num_bytes, read_tensors, tensor_header, tensor_parts
from fedlearn.errors import FedlearnError

METADATA_KEY = "fedlearn"
MAX_HEADER_BYTES = 8 * 2**20  # 8 MiB of JSON give at most about 200 MB of Python objects
MAX_DIGITS = 100  # digits of an integer; readers check the range of each field
UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class WireError(FedlearnError):
    """Bytes are not a valid payload, or a payload does not have the expected content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """Named arrays, and metadata that JSON can represent."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


def pack(payload: Payload) -> bytes:
    """Return a payload as bytes.

    >>> unpack(pack(Payload(metadata={"kind": "hello"}, arrays={"params": np.zeros(2)}))).arrays["params"]
    array([0., 0.])

    Raises:
        ValueError: A number in the metadata is NaN or infinite.
    """
    return b"".join(pack_parts(payload))


def pack_parts(payload: Payload) -> list[Buffer]:
    """Return the bytes of a payload in parts, without a copy of its arrays.

    Raises:
        ValueError: A number in the metadata is NaN or infinite.
    """
    arrays = {name: as_numpy(array) for name, array in payload.arrays.items()}
    return tensor_parts(arrays, {METADATA_KEY: json.dumps({**payload.metadata}, allow_nan=False)})


def pack_bytes(metadata: Mapping[str, Any], name: str, parts: Sequence[Buffer]) -> list[Buffer]:
    """Return the bytes, in parts, of a payload with one array of bytes, which is in parts."""
    specs = {name: ("uint8", (num_bytes(parts),))}
    return [tensor_header(specs, {METADATA_KEY: json.dumps({**metadata}, allow_nan=False)}), *parts]


def unpack(data: Buffer) -> Payload:
    """Return the payload in untrusted bytes. Arrays are views of bytes that may be changed, and copies of others.

    Raises:
        WireError: The bytes are damaged, or their JSON is malformed, too large, too deep or ambiguous.
    """
    view = memoryview(data)
    try:
        header, end = _read_header(view)
        return Payload(
            metadata=_parse_object(header["__metadata__"][METADATA_KEY]), arrays=read_tensors(view[end:], header)
        )
    except UNREADABLE as error:
        raise WireError(f"the payload cannot be read: {type(error).__name__}: {str(error)[:200]}") from error


def write_file(path: Path, payload: Payload) -> None:
    """Write a payload to a file, without a copy of its arrays. `pack` returns the same bytes.

    Raises:
        OSError: The disk is full, or the folder is not writable.
        ValueError: A number in the metadata is NaN or infinite.
    """
    arrays = {name: np.ascontiguousarray(as_numpy(array)) for name, array in payload.arrays.items()}
    metadata = json.dumps({**payload.metadata}, allow_nan=False)
    try:
        save_file(arrays, path, metadata={METADATA_KEY: metadata})
    except SafetensorError as error:  # its text has the number of the error of the system
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def read_file(path: Path) -> Payload:
    """Return the payload in a file.

    Raises:
        WireError: The file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Payload(metadata=_parse_object(file.metadata()[METADATA_KEY]), arrays=arrays)
    except (OSError, *UNREADABLE) as error:
        raise WireError(f"{path} cannot be read: {error}") from error


def map_file(path: Path) -> Payload:
    """Return the payload in a file whose arrays stay in the file. Changes of the arrays do not reach the file.

    Raises:
        WireError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return unpack(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))
    except (OSError, ValueError) as error:
        raise WireError(f"{path} cannot be read: {error}") from error


def read_file_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a payload in a file, from its header only.

    Raises:
        WireError: The file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return _parse_object(file.metadata()[METADATA_KEY])
    except (OSError, *UNREADABLE) as error:
        raise WireError(f"{path} cannot be read: {error}") from error


def read_fields(metadata: Any, **types: type) -> dict[str, Any]:
    """Return some fields of the metadata, after a check of their types.

    Raises:
        WireError: A field is missing or has another type.
    """
    if not isinstance(metadata, dict):
        raise WireError(f"the message has {_short(metadata)} instead of named fields")
    for name, kind in types.items():
        if type(metadata.get(name)) is not kind:
            raise WireError(f"the field {name} is {_short(metadata.get(name))}, expected {kind.__name__}")
    return {name: metadata[name] for name in types}


def read_text(value: Any, name: str, *, max_length: int = 200) -> str:
    """Return untrusted text as one line of printable characters, so that it is safe in logs and on terminals.

    Raises:
        WireError: The value is not a string.
    """
    if not isinstance(value, str):
        raise WireError(f"the field {name} is {_short(value)}, expected str")
    return plain_line(value, max_length=max_length)


def select_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose names start with a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def with_prefix(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays with a prefix added to each name."""
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def require_array(array: np.ndarray, shape: tuple[int, ...], dtype: Any, name: str) -> None:
    """Raise an error for an array of another shape or dtype.

    Raises:
        WireError: The shape or the dtype differs.
    """
    if array.shape != shape or array.dtype != dtype:
        expected = f"{shape} of {np.dtype(dtype).name}"
        raise WireError(f"{name} has shape {array.shape} of {array.dtype}, expected {expected}")


def require_vector(vector_D: np.ndarray, shape: tuple[int, ...], name: str) -> None:
    """Raise an error unless the array is finite float32 of this shape.

    Raises:
        WireError: The shape or the dtype differs, or a number is NaN or infinite.
    """
    require_array(vector_D, shape, np.float32, name)
    if not is_finite(vector_D):
        raise WireError(f"{name} is not finite")


def _read_header(data: memoryview) -> tuple[dict[str, Any], int]:
    """Return the parsed header, and the position of its end."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if length > len(data) - LENGTH_BYTES:
        raise ValueError(f"a header of {length} bytes in a payload of {len(data)}")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"JSON of length {length}, expected at most {MAX_HEADER_BYTES}")
    end = LENGTH_BYTES + length
    return _parse_object(bytes(data[LENGTH_BYTES:end]).decode()), end


def parse_json_object(text: str) -> dict[str, Any]:
    """Return the object in untrusted JSON, without duplicate keys, NaN, infinities, huge integers and lone surrogates.

    Raises:
        WireError: The text is not such an object.
    """
    try:
        return _parse_object(text)
    except UNREADABLE as error:
        raise WireError(f"the JSON cannot be read: {str(error)[:200]}") from error


def _parse_object(text: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys, NaN, infinities, huge integers and lone surrogates."""
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"JSON of length {len(text)}, expected at most {MAX_HEADER_BYTES}")
    value = json.loads(
        text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_finite, parse_constant=_refuse_constant
    )
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, expected an object")
    json.dumps(value, ensure_ascii=False).encode()  # fails for lone surrogates, which a log file cannot contain
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits, expected at most {MAX_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not np.isfinite(number):
        raise ValueError(f"the number {text[:30]} is not finite")
    return number


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"the number {text} is not finite")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
