"""Bytes in Flower's records: the one place where a parcel meets a `RecordDict`.

A small parcel is a value in a config record: each further record of a message costs a request at each station. A large
one is an array, which Flower cuts into objects of 5 MB on its way, so that no message has to fit the 2 GiB of one
protobuf.
"""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

RECORD, SHARED, PARCEL = "fedlearn", "fedlearn.shared", "parcel"
STYPE = "fedlearn.safetensors"
SMALL = 2**20  # bytes


def enclose(payload: bytes) -> RecordDict:
    """A parcel as records."""
    (content,) = enclose_each([payload])
    return content


def enclose_each(payloads: Sequence[bytes], body: bytes = b"") -> list[RecordDict]:
    """Parcels for several receivers, each followed by the same body, of which Flower keeps and sends one copy."""
    if len(body) <= SMALL:
        return [RecordDict({RECORD: _record(payload + body)}) for payload in payloads]
    shared = ArrayRecord({PARCEL: _array(body)})
    return [RecordDict({RECORD: _record(payload), SHARED: shared}) for payload in payloads]


def disclose(content: RecordDict) -> bytes:
    """The parcel in records, with the body that follows it.

    Raises:
        ValueError: there is none.
    """
    parts = [_bytes(content.get(name)) for name in (RECORD, SHARED) if name in content]
    if not parts or None in parts:
        raise ValueError(f"the message holds {sorted(content)}, expected a parcel of fedlearn")
    return b"".join(part for part in parts if part is not None)


def _record(payload: bytes) -> ConfigRecord | ArrayRecord:
    return ConfigRecord({PARCEL: payload}) if len(payload) <= SMALL else ArrayRecord({PARCEL: _array(payload)})


def _array(payload: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)


def _bytes(record: object) -> bytes | None:
    found = record.get(PARCEL) if isinstance(record, ConfigRecord | ArrayRecord) else None
    if isinstance(found, Array) and found.stype == STYPE:
        return bytes(found.data)
    return found if isinstance(found, bytes) else None
