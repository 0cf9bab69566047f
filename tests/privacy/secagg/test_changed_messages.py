"""Well-formed messages with changed fields: client and server answer, or refuse and keep their state."""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("Crypto", reason="secure aggregation needs the extra privacy")
from fedlearn.privacy.secagg import in_memory
from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.errors import ProtocolError
from fedlearn.privacy.secagg.messages import (
    KeyDirectory,
    ReceivedShares,
    Session,
    Survivors,
    UnmaskRequest,
    decode,
    encode,
)
from fedlearn.privacy.secagg.server import RESPONSE_TYPES, Server, ServerStage

REQUEST_TYPES = {
    ServerStage.ADVERTISE: Session,
    ServerStage.SHARE: KeyDirectory,
    ServerStage.MASK: ReceivedShares,
    ServerStage.CONFIRM: Survivors,
    ServerStage.OPEN: UnmaskRequest,
}
VECTORS = np.arange(12, dtype=np.uint32).reshape(3, 4)
IDS = st.sampled_from([0, 1, 2, 3, -1, 300, 2**31, 2**63 - 1, -(2**63)])


def vector_of(session):
    return np.zeros(session.length, session.dtype) if session.length < 1000 else VECTORS[0]


def round_until(stage):
    """Run an honest round of three clients until a stage; return it with the response of client 0."""
    clients, registered = in_memory.create_clients(range(3))
    session = in_memory.create_session(VECTORS, range(3), threshold=2, round=1, run=b"test")
    server = Server(session, registered)
    requests = server.start()
    while server.stage < stage:
        for client, request in requests.items():
            server.add(client, clients[client].respond(request, lambda _, current=client: VECTORS[current]))
        requests = server.advance()
    state = clients[0].state
    return clients[0], state, requests[0], server, clients[0].respond(requests[0], lambda _: VECTORS[0])


ROUNDS = {stage: round_until(stage) for stage in REQUEST_TYPES}


def changed_value(data, value):
    if isinstance(value, int):
        return data.draw(IDS)
    if isinstance(value, bytes):
        return data.draw(st.sampled_from([b"", value[:-1], value + b"x", bytes(len(value)), value[::-1]]))
    if isinstance(value, tuple):
        return data.draw(
            st.sampled_from([(), value[:-1], value[::-1], value * 2]) | st.lists(IDS, max_size=4).map(tuple)
        )
    keys = data.draw(st.lists(st.sampled_from([*value, 7]), min_size=len(value), max_size=len(value)))
    moved = dict(zip(value, (value.get(key, b"") for key in keys), strict=True))
    added = {data.draw(IDS): data.draw(st.sampled_from([b"", bytes(32)]))} if data.draw(st.booleans()) else {}
    return {**moved, **added}


def changed_record(data, message, kind):
    record = decode(message, kind)
    name = data.draw(st.sampled_from([each.name for each in fields(kind)]))
    return encode(replace(record, **{name: changed_value(data, getattr(record, name))}))


@pytest.mark.parametrize("stage", REQUEST_TYPES, ids=lambda stage: stage.name.lower())
@given(data=st.data())
@settings(max_examples=60)
def test_a_client_answers_or_refuses_and_keeps_its_state(stage, data):
    honest, state, request, _, _ = ROUNDS[stage]
    client = Client(honest.identity, honest.registered, state=state)
    try:
        client.respond(changed_record(data, request, REQUEST_TYPES[stage]), vector_of)
    except ProtocolError:
        assert client.state == state


@pytest.mark.parametrize("stage", REQUEST_TYPES, ids=lambda stage: stage.name.lower())
@given(data=st.data())
@settings(max_examples=60)
def test_a_server_accepts_or_refuses_and_still_accepts_the_honest_response(stage, data):
    _, _, _, honest, response = ROUNDS[stage]
    server = copy.deepcopy(honest)
    try:
        server.add(0, changed_record(data, response, RESPONSE_TYPES[stage]))
    except ProtocolError:
        server.add(0, response)
