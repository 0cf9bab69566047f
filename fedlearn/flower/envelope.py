"""Bytes in Flower's records: the one place where a parcel meets a `RecordDict`.

The bytes are one Flower array, which Flower cuts into objects of 5 MB on its way, so that no message has to fit the
2 GiB of one protobuf.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

RECORD, ARRAY, CONFIG = "fedlearn", "parcel", "fedlearn.config"
STYPE = "fedlearn.safetensors"
TIMEOUT = "timeout"


def enclose(payload: bytes, *, timeout: float | None = None) -> RecordDict:
    """A parcel as records; ``timeout`` is how many seconds the messenger may wait for the answer."""
    parcel = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
    content = RecordDict({RECORD: ArrayRecord({ARRAY: parcel})})
    if timeout is not None:
        content[CONFIG] = ConfigRecord({TIMEOUT: float(timeout)})
    return content


def disclose(content: RecordDict) -> bytes:
    """The parcel in records.

    Raises:
        ValueError: there is none.
    """
    try:
        parcel = content.array_records[RECORD][ARRAY]
    except KeyError:
        raise ValueError(f"the message holds {sorted(content)}, expected a parcel of fedlearn") from None
    if parcel.stype != STYPE:
        raise ValueError(f"the message holds an array of {parcel.stype}, expected {STYPE}")
    return bytes(parcel.data)


def timeout_of(content: RecordDict) -> float:
    """How many seconds the sender waits for the answer; 60 where it does not say."""
    config = content.config_records.get(CONFIG)
    value = config.get(TIMEOUT) if config is not None else None
    return float(value) if isinstance(value, int | float) else 60.0
