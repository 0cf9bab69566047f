"""Hostile bytes and JSON: reading returns a valid message or raises `WireError`, in bounded time and memory."""

import json
import time
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_messages import MAX_BYTES, MEMBER, READER, REQUEST, response_with, updates

from fedlearn.core import Failure
from fedlearn.core.metrics import evaluate_client
from fedlearn.core.records import Predictions
from fedlearn.core.serialization import LENGTH_BYTES, MAX_HEADER_BYTES, Payload, WireError, pack, unpack
from fedlearn.protocol.membership import Member, Membership
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.responses import EvaluationReader, ParameterReader, pack_evaluations
from fedlearn.protocol.training_order import read_order, require_order_fits

MESSAGES = {"x": np.arange(6, dtype=np.uint8)}
FULL_REQUEST = replace(REQUEST, content=Payload(metadata={"registered": {"2": "ab"}}, arrays=MESSAGES))
RESPONSE = response_with(updates(2), Failure(client=5, stage="fit", reason="out of memory"))
REFUSAL = NodeResponse.missing(REQUEST, "policy", "not here")
PREDICTIONS = [Predictions(client=c, outputs=np.ones((3, 1)), targets=np.array([0, 1, 1])) for c in (2, 5)]
EVALUATIONS = [evaluate_client(predictions, task="binary") for predictions in PREDICTIONS]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
HEADER_FIELDS = ("kind", "run", "round", "id", "layout")


def read_request(data):
    request = NodeRequest.unpack(data)
    assert request.kind in RequestKind
    assert all(type(value) is str for value in (request.run, request.id, request.layout))
    assert type(request.round) is int
    assert list(request.clients) == sorted(set(request.clients))
    require_order_fits(read_order(request.shared, request.round), MEMBER.layout)


def read_response(data):
    response = NodeResponse.unpack(data, REQUEST, max_bytes=MAX_BYTES)
    present = [*response.clients, *(failure.client for failure in response.failures)]
    assert set(present) <= set(REQUEST.clients)
    assert len(present) == len(set(present))
    assert all(failure.stage.may_be_named_by_node or failure.stage == "node" for failure in response.failures)
    for update in READER.read(response.content, response.clients):
        assert isinstance(update, Failure) or np.isfinite(update.delta_KD).all()


def only_wire_errors(read, *args):
    """Call a reader; return whether it accepted. Any exception but `WireError` fails the test."""
    try:
        read(*args)
    except WireError:
        return False
    return True


SENT = {
    "request": (FULL_REQUEST.pack(), read_request),
    "response": (RESPONSE.pack(), read_response),
    "refusal": (REFUSAL.pack(), read_response),
}


@pytest.mark.parametrize(("data", "read"), SENT.values(), ids=SENT)
def test_the_messages_themselves_are_accepted(data, read):
    assert only_wire_errors(read, data)


@pytest.mark.parametrize(("data", "read"), SENT.values(), ids=SENT)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
@settings(deadline=None, max_examples=300)
def test_changed_bytes_are_read_or_refused(data, read, edits, cut):
    changed = bytearray(data)
    for place, value in edits:
        changed[place % len(changed)] = value
    only_wire_errors(read, bytes(changed[: len(changed) - cut if cut < 20 else len(changed)]))


@pytest.mark.parametrize(("data", "read"), SENT.values(), ids=SENT)
@given(junk=st.binary(max_size=60), place=st.integers(0, 10**6))
@settings(deadline=None, max_examples=200)
def test_inserted_bytes_and_plain_junk_are_read_or_refused(data, read, junk, place):
    place %= len(data)
    only_wire_errors(read, data[:place] + junk + data[place:])
    assert not only_wire_errors(read, junk)


def paths_of(value, path=()):
    """Return the paths of all values in JSON, including the inner ones."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


def with_value(value, path, new):
    """Return the same JSON with another value at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_value(value[path[0]], path[1:], new)
    return copy


def parts_of(data):
    """Return the two payloads of a packed request."""
    end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    return unpack(data[LENGTH_BYTES:end]), unpack(data[end:])


def joined(head, shared):
    packed = pack(head)
    return len(packed).to_bytes(LENGTH_BYTES, "little") + packed + pack(shared)


HEAD, SHARED = parts_of(FULL_REQUEST.pack())
JSON_PARTS = {
    "request": (HEAD, lambda head: read_request(joined(head, SHARED))),
    "order": (SHARED, lambda shared: read_request(joined(HEAD, shared))),
    "response": (unpack(RESPONSE.pack()), lambda payload: read_response(pack(payload))),
    "refusal": (unpack(REFUSAL.pack()), lambda payload: read_response(pack(payload))),
    "hello": (unpack(pack(MEMBER.pack())), lambda payload: Member.read(unpack(pack(payload)), (2, 5), 7)),
}
VALUES = (None, True, -1, 2**80, 0.5, "", "x" * 5000, "\x1b[31m", [], [[]], [None, "x"], [2, 2], {}, {"a": {}})


@pytest.mark.parametrize(("payload", "read"), JSON_PARTS.values(), ids=JSON_PARTS)
def test_each_field_of_another_type_is_read_or_refused(payload, read):
    accepted = []
    for path in paths_of(payload.metadata):
        for value in VALUES if path else VALUES[-2:]:
            if only_wire_errors(read, replace(payload, metadata=with_value(payload.metadata, path, value))):
                accepted.append((path, value))
    # settings and contents are not checked; a text, a count or a stage may have another value of its type
    free = {"settings", "content", "stage", "code", "detail", "reference", "names", "local"}
    texts = {"run", "id", "name", "task", "model", "partition", "framework", "device", "layout", "masking_key"}
    texts |= {"version", "base_digest"}
    for path, value in accepted:
        kept = type(value) is type(_at(payload.metadata, path))
        assert kept or free & set(path) or path in (("state_rounds",), ("refusal",)), (path, value)
        assert type(value) is not str or free & set(path) or texts & set(path) or "leaves" in path, (path, value)


def _at(value, path):
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize(("payload", "read"), JSON_PARTS.values(), ids=JSON_PARTS)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_any_json_in_any_place_is_read_or_refused(payload, read, data):
    path = data.draw(st.sampled_from(list(paths_of(payload.metadata))))
    value = data.draw(JSON if path else st.dictionaries(st.text(max_size=5), JSON, max_size=3))
    only_wire_errors(read, replace(payload, metadata=with_value(payload.metadata, path, value)))


@pytest.mark.parametrize(("payload", "read"), JSON_PARTS.values(), ids=JSON_PARTS)
def test_each_missing_field_is_refused(payload, read):
    for name in payload.metadata:
        rest = {key: value for key, value in payload.metadata.items() if key != name}
        assert not only_wire_errors(read, replace(payload, metadata=rest)), name


def test_a_request_and_a_response_with_an_unknown_field_are_refused():
    for name in ("request", "response", "refusal"):
        payload, read = JSON_PARTS[name]
        assert not only_wire_errors(read, replace(payload, metadata={**payload.metadata, "code": "import os"}))


def test_the_fields_on_the_wire_are_those_of_the_records():
    assert HEAD.metadata.keys() == {f.name for f in fields(NodeRequest)} - {"shared"} | {"version"}
    assert JSON_PARTS["response"][0].metadata.keys() == {f.name for f in fields(NodeResponse)} | {"version"}


ARRAYS = {
    "float64": lambda v: v.astype(np.float64),
    "int32": lambda v: v.astype(np.int32),
    "bytes": lambda v: v.astype(np.uint8),
    "bool": lambda v: v.astype(bool),
    "complex": lambda v: v.astype(np.complex64),
    "shorter": lambda v: v[..., :-1],
    "longer": lambda v: np.concatenate([v, v], axis=-1),
    "deeper": lambda v: v[None],
    "flat": lambda v: np.zeros(0, v.dtype),
    "scalar": lambda v: np.zeros((), v.dtype),
    "nan": lambda v: np.full_like(v, np.nan) if v.dtype.kind == "f" else v[:0],
    "infinite": lambda v: np.full_like(v, np.inf) if v.dtype.kind == "f" else v - 2**40,
}
CONTENTS = {
    "updates": (RESPONSE.content, lambda content: READER.read(content, (2,))),
    "evaluations": (
        pack_evaluations(EVALUATIONS),
        lambda content: EvaluationReader(template=EVALUATIONS[0]).read(content, (2, 5)),
    ),
    "parameters": (
        Payload(arrays={"params": np.zeros(4, np.float32)}),
        lambda content: ParameterReader(num_parameters=4).read(content, ()),
    ),
    "order": (SHARED, lambda content: require_order_fits(read_order(content, 3), MEMBER.layout)),
}


@pytest.mark.parametrize("change", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize(("content", "read"), CONTENTS.values(), ids=CONTENTS)
def test_each_array_of_another_shape_or_dtype_is_refused(content, read, change):
    read(content)
    for name in content.arrays:
        if name.startswith("metric/"):  # NaN if a metric is undefined
            continue
        changed = replace(content, arrays={**content.arrays, name: change(content.arrays[name])})
        if changed.arrays[name].dtype == content.arrays[name].dtype and change is ARRAYS["float64"]:
            continue
        try:
            results = read(changed)
        except WireError:
            continue
        assert all(isinstance(result, Failure) for result in results), name  # failures of this client only


def raw(header, body=b""):
    """Return a payload with a header that no writer produces."""
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + body


def with_metadata(text):
    return raw(json.dumps({"__metadata__": {"fedlearn": text}}).encode())


BOMBS = {
    "deep list": with_metadata('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}"),
    "deep object": with_metadata('{"a":' * 10**5 + "1" + "}" * 10**5),
    "deep header": raw(b"[" * 10**6 + b"]" * 10**6),
    "huge integer": with_metadata('{"round": ' + "9" * 10**6 + "}"),
    "huge exponent": with_metadata('{"round": 1e999999}'),
    "NaN": with_metadata('{"round": NaN}'),
    "infinity": with_metadata('{"round": -Infinity}'),
    "duplicate key": with_metadata('{"round": 1, "round": 2}'),
    "duplicate array": raw(
        b'{"__metadata__":{"fedlearn":"{}"},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "lone surrogate": with_metadata('{"run": "\\ud800"}'),
    "no object": with_metadata("[1]"),
    "not JSON": with_metadata("{'round': 1}"),
    "no metadata": raw(b"{}"),
    "metadata of another type": raw(b'{"__metadata__": [1]}'),
    "header too long": (2**63).to_bytes(8, "little") + b"{}",
    "header over the limit": with_metadata('{"a": "' + "x" * MAX_HEADER_BYTES + '"}'),
    "huge shape": raw(
        b'{"__metadata__":{"fedlearn":"{}"},"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "empty array of a huge shape": raw(
        b'{"__metadata__":{"fedlearn":"{}"},"w":{"dtype":"F32","shape":[0,4611686018427387904,9],"data_offsets":[0,0]}}'
    ),
    "unknown dtype": raw(
        b'{"__metadata__":{"fedlearn":"{}"},"w":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}', b"xx"
    ),
    "no UTF-8": raw(b'{"__metadata__":{"fedlearn":"\xff"}}'),
    "pickle": b"\x80\x04\x95nonsense",
    "empty": b"",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_in_bounded_time_and_memory(bomb):
    request = len(bomb).to_bytes(LENGTH_BYTES, "little") + bomb + pack(SHARED)
    tracemalloc.start()
    began = time.monotonic()
    try:
        for read, data in ((unpack, bomb), (NodeRequest.unpack, request), (read_response, bomb)):
            with pytest.raises(WireError):
                read(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 20
    assert peak < 10 * len(bomb) + 2**22


def test_valid_json_takes_at_most_fifty_times_its_size_in_memory():
    wide = with_metadata('{"a": [' + "[]," * 10**5 + "[]]}")
    tracemalloc.start()
    try:
        unpack(wide)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 * len(wide)


def test_a_node_with_another_pretrained_model_is_refused():
    members = [
        replace(MEMBER, base_digest="ab" * 32, node_id=node, num_examples={node: 10}, names={node: "x"})
        for node in range(3)
    ]
    membership = Membership()
    for member in members[:2]:
        membership.admit(member)
    membership.fix_model()
    for digest in ("cd" * 32, ""):
        with pytest.raises(WireError, match=r"the SHA-256 of its pretrained model is (cdcd|none)"):
            membership.admit(replace(members[2], base_digest=digest))
    membership.admit(members[2])
    assert len(membership.present) == 3
    with pytest.raises(WireError, match="digest of the pretrained model"):
        Member.read(replace(members[2], base_digest="xyz").pack(), [2], 2)
