"""Bytes in Flower's records: the one place where a parcel meets a `RecordDict`.

A small parcel is a value in a config record: each further record of a message costs a request at each station. A large
one is an array, which Flower cuts into objects of 5 MB on its way, so that no message has to fit the 2 GiB of one
protobuf.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

RECORD, PARCEL = "fedlearn", "parcel"
STYPE = "fedlearn.safetensors"
SMALL = 2**20  # bytes


def enclose(payload: bytes) -> RecordDict:
    """A parcel as records."""
    if len(payload) <= SMALL:
        return RecordDict({RECORD: ConfigRecord({PARCEL: payload})})
    parcel = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
    return RecordDict({RECORD: ArrayRecord({PARCEL: parcel})})


def disclose(content: RecordDict) -> bytes:
    """The parcel in records.

    Raises:
        ValueError: there is none.
    """
    record = content.get(RECORD)
    if isinstance(record, ConfigRecord | ArrayRecord):
        found = record.get(PARCEL)
        if isinstance(found, Array) and found.stype == STYPE:
            return bytes(found.data)
        if isinstance(found, bytes):
            return found
    raise ValueError(f"the message holds {sorted(content)}, expected a parcel of fedlearn")
