"""Valid requests and responses are unchanged after transport; invalid ones are refused."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sample_messages import LAYOUT, MAX_BYTES, MEMBER, READER, REQUEST, order, response_with, updates

from fedlearn import LocalSettings
from fedlearn.core import Failure
from fedlearn.core.records import ExampleDP, FailureStage
from fedlearn.core.serialization import Payload, WireError, pack, unpack
from fedlearn.protocol.membership import Member, read_layout
from fedlearn.protocol.messages import VERSION, NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.refusals import Refusal, RefusalCode
from fedlearn.protocol.responses import ParameterReader, pack_parameters
from fedlearn.protocol.training_order import pack_order, read_order, require_order_fits


def arrived(response, request=REQUEST):
    return NodeResponse.unpack(response.pack(), request, max_bytes=MAX_BYTES)


def results_of(response):
    return READER.read(response.content, response.clients)


@given(
    array=arrays.arrays(st.sampled_from([np.float32, np.float64, np.int64]), arrays.array_shapes(max_side=5)),
    fact=st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(), st.lists, max_leaves=5),
)
@settings(deadline=None, max_examples=50)
def test_a_payload_arrives_as_it_was_sent_bit_for_bit(array, fact):
    payload = unpack(pack(Payload(metadata={"fact": fact}, arrays={"array": array})))
    assert payload.metadata["fact"] == fact
    assert payload.arrays["array"].dtype == array.dtype
    assert payload.arrays["array"].tobytes() == array.tobytes()


def test_another_version_is_refused_by_its_number():
    changed = REQUEST.pack().replace(f'\\"version\\": {VERSION}'.encode(), b'\\"version\\": 9')
    with pytest.raises(WireError, match=f"format 9, expected {VERSION}"):
        NodeRequest.unpack(changed)


def test_a_request_arrives_with_all_its_fields():
    local = LocalSettings(steps=5, example_dp=ExampleDP(clip=0.5, noise_multiplier=1.2))
    sent = order(local=local, broadcast={"control": np.ones(4, np.float32)})
    content = Payload(metadata={"note": 1}, arrays={"message": np.arange(3, dtype=np.uint8)})
    request = NodeRequest.unpack(replace(REQUEST, shared=pack_order(sent), content=content).pack())
    for name in ("kind", "run", "round", "id", "settings", "clients", "state_rounds", "layout"):
        assert getattr(request, name) == getattr(REQUEST, name)
    assert request.content.metadata == {"note": 1}
    assert request.content.arrays["message"].tolist() == [0, 1, 2]
    found = read_order(request.shared, request.round)
    assert (found.round, found.seed, found.local) == (3, 7, local)
    assert np.array_equal(found.params_D, sent.params_D)
    assert np.array_equal(found.broadcast["control"], np.ones(4))
    assert request.states_by_client() == {2: 0, 5: 2}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clients": (5, 2)}, "ascending order"),
        ({"clients": (2, 2)}, "occurs twice"),
        ({"clients": (2, -1)}, "clients"),
        ({"state_rounds": (0,)}, "2 clients and 1 rounds"),
        ({"round": -1}, "round"),
        ({"round": 2**60}, "round"),
        ({"run": "a\nb"}, "printable"),
        ({"id": "x" * 201}, "printable"),
        ({"kind": "exec"}, "expected one of hello, init"),
    ],
)
def test_a_request_with_an_invalid_field_is_refused(changes, reason):
    with pytest.raises(WireError, match=reason):
        NodeRequest.unpack(replace(REQUEST, **changes).pack())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"params_D": np.full(4, np.nan, np.float32)}, "params is not finite"),
        ({"params_D": np.zeros(5, np.float32)}, "params has shape"),
        ({"params_D": np.zeros(4)}, "float64"),
        ({"broadcast": {"c": np.ones(5, np.float32)}}, "broadcast c"),
        ({"broadcast": {"stage/0/norm": np.array([np.inf], np.float32)}}, "not finite"),
        ({"broadcast": {"stage/0/norm": np.ones(1, np.uint8)}}, "not finite"),
    ],
)
def test_an_order_that_does_not_fit_the_model_is_refused(changes, reason):
    with pytest.raises(WireError, match=reason):
        require_order_fits(read_order(pack_order(order(**changes)), 3), LAYOUT)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, metadata={**p.metadata, "local": {**p.metadata["local"], "epochs": 0}}),
        lambda p: replace(p, metadata={**p.metadata, "local": {**p.metadata["local"], "epochs": [1]}}),
        lambda p: replace(p, metadata={**p.metadata, "local": {"unknown": 0}}),
        lambda p: replace(p, metadata={**p.metadata, "local": {"example_dp": [1]}}),
        lambda p: replace(p, metadata={**p.metadata, "seed": -1}),
        lambda p: replace(p, metadata={**p.metadata, "seed": True}),
        lambda p: replace(p, arrays={}),
        lambda p: replace(p, arrays={**p.arrays, "more": np.zeros(1)}),
    ],
)
def test_an_order_with_a_wrong_setting_or_array_is_refused(change):
    with pytest.raises(WireError):
        read_order(change(pack_order(order())), 3)


def test_updates_arrive_one_record_a_client_and_client_states_stay():
    response = response_with(updates(2), updates(5, value=2.0))
    first, second = results_of(arrived(response))
    assert (first.clients_K.tolist(), second.clients_K.tolist()) == ([2], [5])
    assert np.array_equal(second.delta_KD, np.full((1, 4), 2.0))
    assert (first.num_examples_K[0], first.num_steps_K[0], first.num_bytes_K[0]) == (10, 2, 32)
    assert first.metrics["loss"].mean == 0.1
    assert first.client_state == {}
    assert b"private" not in response.pack()


def test_a_failure_travels_without_its_reason_and_its_traceback():
    response = response_with(
        updates(2), Failure(client=5, stage="fit", reason="out of memory", traceback="secret path")
    )
    response = replace(response, reference="0a1b2c3d")
    assert b"secret path" not in response.pack()
    assert b"out of memory" not in response.pack()
    (failure,) = arrived(response).failures
    assert (failure.client, failure.stage) == (5, "fit")
    assert failure.reason == "local training failed (reference 0a1b2c3d in the log of the node)"


@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", RequestKind.INIT), ("run", "s"), ("round", 2), ("id", "abd"), ("layout", "0" * 64)],
)
def test_a_response_to_another_request_is_refused(name, value):
    with pytest.raises(WireError, match=f"its {name} is"):
        arrived(replace(response_with(updates(2)), **{name: value}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clients": (2, 3)}, "which are not in the request"),
        ({"clients": (2, 2)}, "occurs twice"),
        ({"failures": (Failure(client=2, stage="fit", reason=""),)}, "several results"),
        ({"failures": (Failure(client=7, stage="fit", reason=""),)}, "which are not in the request"),
    ],
)
def test_results_for_other_clients_or_twice_for_a_client_are_refused(changes, reason):
    with pytest.raises(WireError, match=reason):
        arrived(replace(response_with(updates(2)), **changes))


def test_a_response_with_too_many_bytes_is_refused_before_it_is_read():
    with pytest.raises(WireError, match="expected at most 10"):
        NodeResponse.unpack(b"x" * 11, REQUEST, max_bytes=10)


@pytest.mark.parametrize("stage", list(FailureStage))
def test_a_node_names_only_stages_that_it_may_name(stage):
    response = arrived(NodeResponse.missing(REQUEST, stage, "not here"))
    failures = arrived(replace(response_with(), failures=(Failure(client=2, stage=stage, reason="no"),))).failures
    expected = stage if stage.may_be_named_by_node else FailureStage.NODE
    assert (response.refusal.stage, response.refusal.reason) == (expected, "not here")
    assert failures[0].stage == expected


DAMAGED = Refusal(stage=FailureStage.REQUEST, code=RefusalCode.REQUEST, detail="damaged")


def test_a_refusal_of_an_unreadable_request_is_accepted_and_results_without_id_are_not():
    assert arrived(NodeResponse.refuse(None, DAMAGED)).refusal.reason == "damaged"
    with pytest.raises(WireError, match="its id is ''"):
        arrived(replace(response_with(updates(2)), id=""))


def test_a_reason_is_one_line_of_printable_characters():
    hostile = "a\x1b[31mred\n2026-11-28 INFO forged" + "x" * 9999
    refusal = arrived(NodeResponse.refuse(REQUEST, replace(DAMAGED, detail=hostile, reference="\x1b[2J"))).refusal
    assert refusal.reason.isprintable()
    assert len(refusal.reason) <= 2000
    assert refusal.reference == ""


@pytest.mark.parametrize("code", list(RefusalCode))
def test_only_some_codes_carry_a_text_and_each_other_code_has_a_sentence_with_a_fix(code):
    refusal = Refusal(stage=code.stage, code=code, detail="row 6 has acme", reference="0a1b2c3d")
    packed = NodeResponse.refuse(REQUEST, refusal).pack()
    assert (b"acme" in packed) is code.has_detail
    reason = NodeResponse.unpack(packed, REQUEST, max_bytes=2**20).refusal.reason
    assert code.has_detail or (re.search("; (try|ask) ", reason) and "0a1b2c3d" in reason)


def test_an_unknown_code_becomes_internal():
    packed = NodeResponse.refuse(REQUEST, replace(DAMAGED, code=RefusalCode.BUSY)).pack()
    changed = packed.replace(b'\\"busy\\"', b'\\"what\\"')
    assert NodeResponse.unpack(changed, REQUEST, max_bytes=2**20).refusal.code == RefusalCode.INTERNAL


def test_a_client_with_wrong_numbers_is_a_failure_and_its_neighbor_is_not():
    broken = updates(2)
    broken.num_examples_K[0] = -3
    failure, update = results_of(arrived(response_with(broken, updates(5))))
    assert (failure.client, failure.stage) == (2, "update")
    assert "-3 training examples" in failure.reason
    assert update.clients_K.tolist() == [5]


def test_a_client_with_another_example_count_than_declared_is_a_failure():
    reader = replace(READER, num_examples={2: 9})
    failure, update = reader.read(response_with(updates(2), updates(5)).content, (2, 5))
    assert "10 training examples; the node declared 9" in failure.reason
    assert update.clients_K.tolist() == [5]


def test_initial_parameters_of_another_dtype_are_refused():
    reader = ParameterReader(num_parameters=4)
    assert reader.read(pack_parameters(np.zeros(4, np.float32)), ())[0].tolist() == [0] * 4
    with pytest.raises(WireError, match="float64"):
        reader.read(pack_parameters(np.zeros(4)), ())
    with pytest.raises(WireError, match="no parameters"):
        reader.read(Payload(), ())


def test_the_description_of_a_node_arrives_as_it_was_sent():
    content = unpack(pack(MEMBER.pack()))
    assert Member.read(content, (2, 5), 7) == replace(MEMBER, node_id=7)


def test_a_layout_travels_as_json():
    leaves = json.loads(json.dumps(MEMBER.pack().metadata["leaves"]))
    assert read_layout(leaves).digest == LAYOUT.digest


@pytest.mark.parametrize(
    "leaves",
    [
        None,
        [["w"]],
        [["w", [2], "float32", 0]],
        [["w", [-1], "float32", False]],
        [["w", ["2"], "float32", False]],
        [["w", [2], "object", False]],
        [["w", [2**40, 2**40], "float32", False]],
        [["w", [2**31 + 1], "float32", False]],
        [["v", [2**30], "float32", False], ["w", [2**30, 2], "float32", False]],
        [["w", [10**15], "float32", False]],
        [["w", [2], "float32", False], ["v", [2], "float32", False]],
        [["w", [2], "float32", False], ["w", [2], "float32", False]],
    ],
)
def test_a_layout_that_is_none_is_refused(leaves):
    with pytest.raises(WireError):
        read_layout(leaves)
