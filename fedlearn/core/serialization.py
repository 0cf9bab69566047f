"""Facts and arrays as bytes: safetensors in memory, with the facts as JSON in its header.

Shapes: D parameters laid flat.

Nothing in a parcel can be executed, whoever wrote it. `VERSION` tells two ends apart that are not of the same make.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from fedlearn.core.arrays import as_numpy
from fedlearn.errors import FedlearnError

VERSION = 2
METADATA_KEY = "fedlearn"


class WireError(FedlearnError):
    """A parcel is not what it must be: damaged, of another version, or an answer to something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """Facts, which JSON can hold, and arrays."""

    metadata: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


def pack(payload: Payload) -> bytes:
    """A parcel as bytes.

    >>> unpack(pack(Payload(metadata={"kind": "hello"}, arrays={"params": np.zeros(2)}))).arrays["params"]
    array([0., 0.])
    """
    arrays = {name: np.ascontiguousarray(as_numpy(array)) for name, array in payload.arrays.items()}
    facts = json.dumps({**payload.metadata, "version": VERSION}, allow_nan=False)
    return bytes(to_safetensors(arrays, metadata={METADATA_KEY: facts}))


def unpack(data: bytes) -> Payload:
    """A parcel from bytes; or from those of a parcel without arrays, followed by one that several receivers share.

    >>> letter = pack(Payload(metadata={"to": 7})) + pack(Payload(metadata={"say": "hi"}, arrays={"w": np.ones(1)}))
    >>> unpack(letter).metadata["to"], unpack(letter).metadata["say"], unpack(letter).arrays["w"]
    (7, 'hi', array([1.]))

    Raises:
        WireError: the bytes are damaged, or of another version.
    """
    try:
        facts, end = _facts(data)
        if end is None or end == len(data):
            return Payload(metadata=facts, arrays=from_safetensors(data))
        shared, _ = _facts(data[end:])
        return Payload(metadata={**shared, **facts}, arrays=from_safetensors(data[end:]))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"the message cannot be read: {type(error).__name__}: {error}") from error


def _facts(payload: bytes) -> tuple[dict[str, Any], int | None]:
    """The facts in a header, and where the parcel ends if it has no arrays."""
    end = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8:end])
    facts = json.loads(header["__metadata__"][METADATA_KEY])
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        found = facts.get("version") if isinstance(facts, dict) else None
        raise WireError(f"the message has format {found}, expected {VERSION}: install the same fedlearn on both sides")
    return facts, end if len(header) == 1 else None


def read_fields(metadata: Any, **kinds: type) -> dict[str, Any]:
    """Some of the facts, each of the kind that it must be.

    Raises:
        WireError: one is missing or of another kind.
    """
    if not isinstance(metadata, dict):
        raise WireError(f"the message has {metadata!r} where named facts belong")
    for name, kind in kinds.items():
        if type(metadata.get(name)) is not kind:
            raise WireError(f"the message has {metadata.get(name)!r} as its {name}, expected {kind.__name__}")
    return {name: metadata[name] for name in kinds}


def select_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def require_array(array: np.ndarray, shape: tuple[int, ...], dtype: Any, name: str) -> None:
    """Refuse an array of another shape or dtype.

    Raises:
        WireError: it is.
    """
    if array.shape != shape or array.dtype != dtype:
        expected = f"{shape} of {np.dtype(dtype).name}"
        raise WireError(f"{name} arrived with shape {array.shape} of {array.dtype}, expected {expected}")


def require_vector(vector_D: np.ndarray, shape: tuple[int, ...], name: str) -> None:
    """Refuse what is not a finite float32 vector of this shape.

    Raises:
        WireError: it is not.
    """
    require_array(vector_D, shape, np.float32, name)
    if not np.isfinite(vector_D).all():
        raise WireError(f"{name} that arrived is not finite")
