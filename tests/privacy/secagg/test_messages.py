"""Hostile bytes: reading returns a valid record, or raises `ProtocolError`."""

import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cbor2", reason="secure aggregation needs the extra privacy")
import cbor2

from fedlearn.privacy.secagg import messages
from fedlearn.privacy.secagg.errors import ProtocolError
from fedlearn.privacy.secagg.messages import (
    HEADER_BYTES,
    RECORD_TYPES,
    KeyDirectory,
    MaskedVector,
    Session,
    Survivors,
    decode,
    encode,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
BY_TYPE = {
    "int": INT64,
    "bytes": st.binary(max_size=40),
    "tuple[int, ...]": st.lists(INT64, max_size=5).map(tuple),
    "Mapping[int, bytes]": st.dictionaries(INT64, st.binary(max_size=9), max_size=30),
}
RECORDS = st.one_of(
    *(st.builds(kind, **{each.name: BY_TYPE[each.type] for each in fields(kind)}) for kind in RECORD_TYPES)
)
SCALARS = st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=4), st.binary(max_size=4), st.integers())
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS.filter(bool), inner, max_size=3)
)
SURVIVORS = Survivors(session=b"s" * 32, survivors=(1, 2, 300), dropped=(4,))
DIRECTORY = KeyDirectory(session=b"", keys={1: b"a", 2: b"b"})


def header(kind):
    return messages.MAGIC + bytes((messages.VERSION, RECORD_TYPES.index(kind) + 1))


def rejected_or_canonical(data, kind):
    """Decode; accepted bytes are canonical, and the fields have the declared types."""
    try:
        record = decode(data, kind)
    except ProtocolError:
        return
    assert encode(record) == data
    for each in fields(kind):
        outer = each.type.partition("[")[0]
        assert type(getattr(record, each.name)).__name__ == {"Mapping": "dict"}.get(outer, outer)


@given(RECORDS)
def test_a_record_survives_encoding(record):
    decoded = decode(encode(record), type(record))
    assert decoded == record
    assert type(decoded) is type(record)


def test_mappings_are_in_the_order_of_their_keys():
    keys = {300: b"", -1: b"", 5: b"", -(2**40): b"", 24: b""}
    assert [*decode(encode(replace(DIRECTORY, keys=keys)), KeyDirectory).keys] == sorted(keys)


def test_integers_of_numpy_are_integers():
    assert encode(replace(SURVIVORS, survivors=tuple(np.array([1, 2, 300])))) == encode(SURVIVORS)


@given(st.data())
def test_equal_records_have_equal_bytes(data):
    pairs = data.draw(st.dictionaries(INT64, st.binary(max_size=3), max_size=40))
    shuffled = dict(data.draw(st.permutations(list(pairs.items()))))
    assert encode(replace(DIRECTORY, keys=pairs)) == encode(replace(DIRECTORY, keys=shuffled))


@given(RECORDS, st.data())
def test_changed_bytes_give_a_canonical_record_or_the_protocol_error(record, data):
    raw = bytearray(encode(record))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(HEADER_BYTES, len(raw)))
        end = data.draw(st.integers(start, min(len(raw), start + 4)))
        raw[start:end] = data.draw(st.binary(max_size=9))
    rejected_or_canonical(bytes(raw), type(record))


@given(RECORDS, VALUES, st.data())
def test_a_field_of_any_other_type_gives_a_canonical_record_or_the_protocol_error(record, value, data):
    names = [each.name for each in fields(record)]
    changed = data.draw(st.sampled_from(names))
    values = [value if name == changed else getattr(record, name) for name in names]
    rejected_or_canonical(header(type(record)) + cbor2.dumps(values, canonical=True), type(record))


@given(st.sampled_from(RECORD_TYPES), st.binary(max_size=60))
@settings(max_examples=300)
def test_random_bytes_give_a_canonical_record_or_the_protocol_error(kind, tail):
    rejected_or_canonical(header(kind) + tail, kind)
    rejected_or_canonical(header(kind) + bytes([0x80 | len(fields(kind))]) + tail, kind)


EMPTY = "40"
KEYS = "a2014161024162"  # {1: b"a", 2: b"b"}
HOSTILE = {  # the fields of a KeyDirectory, in hexadecimal
    "trailing byte": f"82{EMPTY}{KEYS}00",
    "cut off": f"82{EMPTY}{KEYS[:-2]}",
    "one field": f"81{EMPTY}",
    "three fields": f"83{EMPTY}{KEYS}00",
    "no array": KEYS,
    "long form of the array": f"9802{EMPTY}{KEYS}",
    "indefinite array": f"9f{EMPTY}{KEYS}ff",
    "indefinite mapping": f"82{EMPTY}bf014161ff",
    "indefinite bytes": f"825f4161ff{KEYS}",
    "long form of a length": f"825800{KEYS}",
    "long form of a key": f"82{EMPTY}a218014161024162",
    "keys in another order": f"82{EMPTY}a2024162014161",
    "a key twice": f"82{EMPTY}a2014161014161",
    "a key twice, in two forms": f"82{EMPTY}a201416118014161",
    "huge array": f"82{EMPTY}9b7fffffffffffffff00",
    "huge mapping": f"82{EMPTY}bb7fffffffffffffff00",
    "huge bytes": f"825b7fffffffffffffff{KEYS}",
    "text in place of bytes": f"8260{KEYS}",
    "not a number in place of bytes": f"82f97e00{KEYS}",
    "null in place of a mapping": f"82{EMPTY}f6",
    "undefined": f"82{EMPTY}f7",
    "simple value": f"82{EMPTY}e0",
    "boolean key": f"82{EMPTY}a1f54161",
    "float key": f"82{EMPTY}a1f93c004161",
    "key beyond 64 bits": f"82{EMPTY}a11bffffffffffffffff4161",
    "number as value": f"82{EMPTY}a10101",
    "list in place of a mapping": f"82{EMPTY}8100",
    "deep nesting": f"82{EMPTY}" + "81" * 100_000 + "00",
    "tag: big integer as key": f"82{EMPTY}a1c241014161",
    "tag: date": f"82{EMPTY}c074323032362d31312d32385430303a30303a30305a",
    "tag: decimal": f"82{EMPTY}c4821b7fffffffffffffff01",
    "tag: pattern": f"82{EMPTY}d82363282a61",
    "tag: e-mail": f"82{EMPTY}d8246161",
    "tag: cycle": f"82{EMPTY}d81c81d81d00",
    "tag: string reference": f"d9010082{EMPTY}d81900",
    "tag: self-described": f"d9d9f782{EMPTY}{KEYS}",
    "tag: unknown": f"82{EMPTY}d9fffe{KEYS}",
    "nothing": "",
}


def test_the_form_that_the_hostile_ones_change_is_accepted():
    assert decode(header(KeyDirectory) + bytes.fromhex(f"82{EMPTY}{KEYS}"), KeyDirectory) == DIRECTORY


@pytest.mark.parametrize("fields_hex", HOSTILE.values(), ids=HOSTILE)
def test_bytes_that_are_not_canonical_are_refused(fields_hex):
    with pytest.raises(ProtocolError):
        decode(header(KeyDirectory) + bytes.fromhex(fields_hex), KeyDirectory)


@pytest.mark.parametrize("tag", [*range(0, 65), 100, 258, 260, 261, 1004, 43000, 55799, 2**64 - 1])
def test_no_tag_is_decoded(tag):
    content = cbor2.dumps(cbor2.CBORTag(tag, b"\1"))
    with pytest.raises(ProtocolError, match=f"tag {tag} is not allowed"):
        decode(header(MaskedVector) + b"\x83" + content + b"\x01\x40", MaskedVector)


def peak_bytes(data, kind):
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode(data, kind)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("item", [b"\xe5", b"\x80", b"\xa0", b"\x60", b"\xf9\x3c\x01"])
def test_a_message_of_small_items_needs_little_memory(item):
    """Check the peak memory.

    A list of a million simple values would take many times the bytes of its message.
    """
    count = 2_000_000
    items = b"\x9a" + count.to_bytes(4, "big") + item * count
    assert peak_bytes(header(MaskedVector) + items, MaskedVector) < 1e6
    long = (
        header(Survivors) + b"\x83\x40" + items.replace(items[1:5], (20_000_000).to_bytes(4, "big")) + item * 18_000_000
    )
    assert peak_bytes(long, Survivors) < 1e6


def test_a_masked_vector_may_be_longer_than_other_messages(monkeypatch):
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 1000)
    vector = MaskedVector(session=b"s" * 32, client=1, vector=bytes(5000))
    assert decode(encode(vector), MaskedVector) == vector
    with pytest.raises(ProtocolError, match="KeyDirectory has 5012 bytes, expected at most 1000"):
        decode(encode(replace(DIRECTORY, keys={1: bytes(5000)})), KeyDirectory)


def test_a_message_of_the_version_before_is_refused_by_number():
    with pytest.raises(ProtocolError, match="protocol version 1, expected 3"):
        decode(b"fsa\1\1" + bytes(40), Session)


def test_values_are_not_nested_deeper_than_a_record_needs():
    with pytest.raises(ProtocolError, match="nesting depth"):
        decode(header(Survivors) + cbor2.dumps([b"s", [[1]], []]), Survivors)


def test_the_error_names_the_field():
    wrong = header(Survivors) + cbor2.dumps([b"s", [1, "2"], []])
    with pytest.raises(ProtocolError, match=r"Survivors\.survivors is not of type tuple\[int, \.\.\.\]"):
        decode(wrong, Survivors)
    with pytest.raises(ProtocolError, match="KeyDirectory, expected Session or Survivors"):
        decode(encode(DIRECTORY), Session, Survivors)
