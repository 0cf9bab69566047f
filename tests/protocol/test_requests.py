"""What travels between coordinator and nodes, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedlearn import LocalSettings, Updates
from fedlearn.core import Failure, Request
from fedlearn.core.layout import Layout
from fedlearn.core.records import ExampleDP, MetricSum
from fedlearn.core.serialization import Payload, WireError, pack, unpack
from fedlearn.protocol.requests import (
    RequestHeader,
    layout_from_json,
    layout_to_json,
    pack_request,
    pack_request_body,
    read_params,
    read_request,
)
from fedlearn.protocol.responses import pack_fit_response, pack_refusal, pack_response, read_updates, unpack_response

LAYOUT = Layout.from_shapes([("out.weight", (1, 3)), ("out.bias", (1,))])
SIZES = {"delta": 4, "change": 4}
ASK = RequestHeader(
    kind="fit", run="r", round=3, id="abc", settings={"scenario": {}}, clients=(2, 5), layout=LAYOUT.digest
)


def order(**changes):
    given = {"round": 3, "seed": 7, "params_D": np.arange(4, dtype=np.float32), "deployed": True}
    return Request(**{**given, **changes})


def fit_request(ask, order, since):
    return pack_request(ask, since=[since.get(client, 0) for client in ask.clients]) + pack_request_body(order)


def updates(*clients, value=1.0):
    k = len(clients)
    return Updates(
        clients_K=np.array(clients),
        delta_KD=np.full((k, 4), value, np.float32),
        num_examples_K=np.full(k, 10, np.int64),
        num_steps_K=np.full(k, 2, np.int64),
        metrics={"loss": MetricSum(np.ones(k), np.full(k, 10.0))},
        client_state={"own": np.ones((k, 4), np.float32)},
        extra={"change": np.ones((k, 4), np.float32)},
    )


@given(
    array=arrays.arrays(st.sampled_from([np.float32, np.float64, np.int64]), arrays.array_shapes(max_side=5)),
    fact=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5),
)
@settings(deadline=None, max_examples=50)
def test_a_parcel_arrives_as_it_was_sent_bit_for_bit(array, fact):
    arrived = unpack(pack(Payload(metadata={"fact": fact}, arrays={"array": array})))
    assert arrived.metadata["fact"] == fact
    assert arrived.arrays["array"].dtype == array.dtype
    assert arrived.arrays["array"].tobytes() == array.tobytes()


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_other_bytes_are_refused_and_nothing_else_happens(junk):
    with pytest.raises(WireError, match="cannot be read"):
        unpack(junk)


def test_another_version_is_refused_by_its_number():
    changed = pack(Payload(metadata={})).replace(b'\\"version\\": 2', b'\\"version\\": 9')
    with pytest.raises(WireError, match="format 9, expected 2"):
        unpack(changed)


def test_an_order_arrives_with_settings_broadcasts_and_the_memories_to_start_from():
    local = LocalSettings(steps=5, example_dp=ExampleDP(clip=0.5, noise_multiplier=1.2))
    sent = order(local=local, broadcast={"control": np.ones(4, np.float32)})
    parcel = unpack(fit_request(ASK, sent, {5: 2}))
    assert RequestHeader.from_metadata(parcel.metadata) == ASK
    arrived, since = read_request(parcel, LAYOUT)
    assert (arrived.round, arrived.seed, arrived.local) == (3, 7, local)
    assert np.array_equal(arrived.params_D, sent.params_D)
    assert np.array_equal(arrived.broadcast["control"], np.ones(4))
    assert since == {2: 0, 5: 2}


def test_an_order_for_another_model_or_that_is_not_finite_is_refused():
    with pytest.raises(WireError, match="another layout"):
        read_request(unpack(fit_request(ASK, order(), {})), Layout.from_shapes([("w", (4,))]))
    with pytest.raises(WireError, match="not finite"):
        read_request(unpack(fit_request(ASK, order(params_D=np.full(4, np.nan, np.float32)), {})), LAYOUT)
    with pytest.raises(WireError, match="broadcast c"):
        read_request(unpack(fit_request(ASK, order(broadcast={"c": np.ones(5, np.float32)}), {})), LAYOUT)


def test_local_settings_out_of_range_are_refused_at_the_node_too():
    parcel = unpack(fit_request(ASK, order(), {}))
    broken = Payload(
        metadata={**parcel.metadata, "local": {**parcel.metadata["local"], "epochs": 0}}, arrays=parcel.arrays
    )
    with pytest.raises(WireError, match="epochs"):
        read_request(broken, LAYOUT)


def test_updates_arrive_one_record_a_client_and_memories_stay():
    payload = pack_fit_response(ASK, [updates(2), updates(5, value=2.0)])
    first, second = read_updates(unpack_response(ASK, payload), ASK, SIZES)
    assert (first.clients_K.tolist(), second.clients_K.tolist()) == ([2], [5])
    assert np.array_equal(second.delta_KD, np.full((1, 4), 2.0))
    assert (first.num_examples_K[0], first.num_steps_K[0], first.num_bytes_K[0]) == (10, 2, 32)
    assert first.metrics["loss"].mean == 0.1
    assert first.client_state == {}
    assert b"own" not in payload


def test_a_failure_travels_without_its_traceback():
    lost = Failure(client=5, stage="fit", reason="out of memory", traceback="secret path")
    payload = pack_fit_response(ASK, [updates(2), lost])
    assert b"secret path" not in payload
    failure, one = read_updates(unpack_response(ASK, payload), ASK, SIZES)
    assert (failure.client, failure.stage, failure.reason) == (5, "fit", "out of memory")
    assert one.clients_K.tolist() == [2]


@pytest.mark.parametrize(
    ("name", "value"), [("kind", "init"), ("run", "s"), ("round", 2), ("id", "abd"), ("layout", "0" * 64)]
)
def test_a_reply_to_anything_else_is_refused(name, value):
    other = RequestHeader(**{**{field: getattr(ASK, field) for field in ASK.__dataclass_fields__}, name: value})
    with pytest.raises(WireError, match=f"its {name} is"):
        unpack_response(ASK, pack_fit_response(other, [updates(2)]))


def test_a_refusal_brings_its_stage_and_reason():
    facts = unpack(fit_request(ASK, order(), {})).metadata
    assert unpack_response(ASK, pack_refusal(facts, "policy", "not here")) == ("policy", "not here")


def test_a_client_with_no_examples_or_infinite_metrics_is_a_failure_and_its_neighbour_is_not():
    broken = updates(2)
    broken.num_examples_K[0] = -3
    (failure, one) = read_updates(unpack_response(ASK, pack_fit_response(ASK, [broken, updates(5)])), ASK, SIZES)
    assert (failure.client, failure.stage) == (2, "update")
    assert "-3 training examples" in failure.reason
    assert one.clients_K.tolist() == [5]


def test_facts_of_the_wrong_kind_are_refused_by_name():
    facts = {**unpack(fit_request(ASK, order(), {})).metadata, "round": "3"}
    with pytest.raises(WireError, match="'3' as its round, expected int"):
        RequestHeader.from_metadata(facts)
    with pytest.raises(WireError, match="expected one of hello, init"):
        RequestHeader.from_metadata({**facts, "round": 3, "kind": "exec"})


def test_a_layout_travels_as_json():
    assert layout_from_json(json.loads(json.dumps(layout_to_json(LAYOUT)))) == LAYOUT
    with pytest.raises(WireError, match="layout cannot be read"):
        layout_from_json([["w"]])


def test_initial_parameters_of_another_dtype_are_refused():
    with pytest.raises(WireError, match="float64"):
        read_params(unpack(pack_response(ASK, {"params": np.zeros(4)})), LAYOUT)
