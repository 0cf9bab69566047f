"""Secure aggregation with real node services behind a Flower `Grid`: only the sum of the updates is visible."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest
from needs import needs
from sample_messages import training_request

from fedlearn import Schedule, federate, serial, start
from fedlearn.errors import FedlearnError, TooManyFailures
from fedlearn.runner.instantiation import build
from fedlearn.runner.registry import installed_registry
from fedlearn.testing import LOCAL_SETTINGS

pytest.importorskip("flwr", reason="the extra flower is not installed")
pytest.importorskip("Crypto", reason="the extra privacy is not installed")

from fedlearn.core.serialization import pack, unpack
from fedlearn.deploy.coordinator_side.remote_scenario import remote_scenario
from fedlearn.deploy.node_side.required_privacy import RequiredPrivacy
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.privacy.secagg.errors import SecAggAborted
from fedlearn.privacy.secagg.messages import Session, encode
from fedlearn.protocol.membership import FederationError
from fedlearn.protocol.messages import NodeRequest, RequestKind
from fedlearn.protocol.secagg_exchange import pack_mask_request
from fedlearn.protocol.sites import RunSites

needs("dp_accounting", reason="the extra privacy is not installed")

SECAGG = {"name": "secagg", "clip_norm": 10.0}
NOISY = {"name": "distributed", "noise_multiplier": 1.0, "clip_norm": 1.0}


def masked(federation, strategy="fedavg", **settings):
    return federation(strategy=strategy, words={"strategy": {"weighting": "equal"}}, masking=True, **settings)


def protected(built, words, clients, rounds=3):
    strategy = build(built.settings["strategy"], "strategy", allow=built.allow)
    population = Population(clients=clients, rounds=rounds, num_parties=len(built.sites))
    mechanism = build(installed_registry().resolve("privacy", words), "privacy")
    return mechanism.protect(strategy, LOCAL_SETTINGS, population)


def run(built, words=SECAGG, rounds=3, **schedule):
    scenario = remote_scenario(built.engine)
    strategy, local = protected(built, words, built.engine.clients, rounds)
    built.engine.set_privacy(words, rounds=rounds)
    state = start(strategy, scenario.trainer.init(1), built.engine, seed=1)
    return list(federate(strategy, built.engine, state, schedule=Schedule(rounds=rounds, **schedule), local=local))


def simulated(built, words=SECAGG, rounds=3):
    scenario = build(built.settings["scenario"], "scenario", allow=built.allow)
    engine = serial(scenario.data, scenario.trainer)
    strategy, local = protected(built, words, engine.clients, rounds)
    state = start(strategy, scenario.trainer.init(1), engine, seed=1)
    return list(federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=local))


def record_responses(built, change=lambda node, asked, parcel: parcel):
    """Record each response as it leaves a node, after ``change``; a change to None drops the response."""
    heard = []
    for node, site in built.sites.items():

        def answer(payload, node=node, site=site):
            asked, parcel = NodeRequest.unpack(payload), unpack(site.respond_to_bytes(payload))
            heard.append(parcel)
            changed = change(node, asked, parcel)
            if changed is None:
                raise RuntimeError("the connection is lost")
            return pack(changed)

        built.grid.nodes[node] = answer
    return heard


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_a_masked_deployed_run_gives_the_parameters_of_a_simulated_one_bit_for_bit(federation, strategy):
    built = masked(federation, strategy)
    there, here = run(built)[-1], simulated(built)[-1]
    assert np.array_equal(there.state.params_D, here.state.params_D)
    assert not np.array_equal(there.state.params_D, run(masked(federation), rounds=1)[-1].state.params_D)


def test_no_update_leaves_a_node_in_the_clear_and_no_count_or_metric_at_all(federation):
    built = masked(federation)
    heard = record_responses(built)
    rounds = run(built, rounds=1)
    kinds = {parcel.metadata["kind"] for parcel in heard}
    assert kinds == {"hello", "init", "mask"}
    vectors = [
        vector
        for parcel in heard
        if parcel.metadata["kind"] == "mask"
        for vector in parcel.arrays.values()
        if vector.dtype != np.uint8
    ]
    assert not vectors
    assert rounds[0].metrics == {}
    assert rounds[0].num_examples is None


def test_a_round_survives_the_client_that_falls_silent_and_gives_the_sum_of_the_others(federation):
    built = masked(federation, clients=((0,), (1,), (2,), (3,)), deadline=2)

    def silent_when_masked(node, asked, parcel):
        return None if node == 104 and "params" in asked.shared.arrays else parcel

    record_responses(built, silent_when_masked)
    (item,) = run(built, rounds=1, max_failures=0.5)
    assert [failure.client for failure in item.failures] == [3]
    assert item.num_updates == 3
    scenario = build(built.settings["scenario"], "scenario", allow=built.allow)
    engine = serial(scenario.data, scenario.trainer)
    strategy, local = protected(built, SECAGG, engine.clients)
    three = strategy.select._replace(choose=lambda *_: (0, 1, 2))
    state = start(strategy, scenario.trainer.init(1), engine, seed=1)
    (expected,) = federate(replace(strategy, select=three), engine, state, schedule=Schedule(rounds=1), local=local)
    assert np.array_equal(item.state.params_D, expected.state.params_D)


def masked_arrays(change):
    """Apply a change to the masked vectors of node 104; return a function for `record_responses`."""

    def changed(node, asked, payload):
        training = node == 104 and "params" in asked.shared.arrays
        return replace(payload, arrays=change(payload.arrays)) if training else payload

    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda arrays: {}, "the content has the messages"),
        (lambda arrays: {"response/0": arrays["response/3"]}, "the content has the messages"),
        (lambda arrays: {**arrays, "response/0": arrays["response/3"]}, "the content has the messages"),
        (lambda arrays: {"response/3": arrays["response/3"].astype(np.float32)}, "not a vector of bytes"),
        (lambda arrays: {"response/3": arrays["response/3"][:-1]}, "ends too early|malformed|CBOR|bytes"),
        (lambda arrays: {"response/3": np.zeros(2**22, np.uint8)}, "expected at most"),
    ],
    ids=["none", "other client", "more", "dtype", "cut", "oversize"],
)
def test_a_malformed_masked_vector_is_a_failure_of_its_client_only(federation, change, reason):
    built = masked(federation, clients=((0,), (1,), (2,), (3,)))
    record_responses(built, masked_arrays(change))
    (item,) = run(built, rounds=1, max_failures=0.5)
    assert [failure.client for failure in item.failures] == [3]
    assert re.search(reason, item.failures[0].reason)
    assert item.num_updates == 3


def test_below_the_threshold_no_sum_is_opened_and_the_round_is_aborted_by_name(federation):
    built = masked(federation, deadline=1)
    record_responses(
        built, lambda node, asked, parcel: None if node == 102 and "params" in asked.shared.arrays else parcel
    )
    with pytest.raises(SecAggAborted, match="1 of 2 parties responded, fewer than threshold 2"):
        run(built, rounds=1)


def test_noise_at_the_nodes_adds_up_and_does_not_follow_from_the_seed(federation):
    item, other = (run(masked(federation), NOISY, rounds=2) for _ in range(2))
    assert not np.array_equal(item[-1].state.params_D, other[-1].state.params_D)
    assert item[-1].privacy.value == simulated(masked(federation), NOISY, rounds=2)[-1].privacy.value > 0


def test_a_node_never_sends_a_masked_strategys_update_on_an_ordinary_order(federation):
    built = masked(federation)
    remote_scenario(built.engine)
    words = {**built.order, "privacy": SECAGG, "population": {"num_clients": 4, "rounds": 1}}
    response = built.sites[101].respond(training_request(built.engine.layout, words, LOCAL_SETTINGS))
    assert not response.content.arrays
    assert "through secure aggregation only" in response.refusal.reason


@pytest.mark.parametrize(
    ("protection", "words", "reason"),
    [
        ({"minimum": "secagg"}, None, "this node requires privacy=secagg or distributed"),
        ({"minimum": "secagg", "min_nodes_in_sum": 3}, SECAGG, "this node accepts at least 3"),
        ({"minimum": "secagg", "max_clip": 1.0}, {**SECAGG, "clip_norm": 5.0}, "this node accepts at most 1.0"),
        ({"minimum": "secagg", "max_epsilon": 1.0}, SECAGG, "privacy=secagg has no epsilon"),
    ],
    ids=["unmasked", "small sum", "clip", "no epsilon"],
)
def test_a_nodes_policy_may_demand_masks(federation, protection, words, reason):
    built = masked(federation, policy={"required_privacy": RequiredPrivacy(**protection)})
    with pytest.raises((FedlearnError, TooManyFailures), match=reason):
        run(built, words or {"name": "none"}, rounds=1)
    fine = masked(federation, policy={"required_privacy": RequiredPrivacy(minimum="secagg", min_nodes_in_sum=2)})
    assert len(run(fine, rounds=1)) == 1


def test_a_node_is_in_no_sum_with_keys_that_were_not_agreed_upon(federation):
    built = masked(federation)
    keys = built.sites[102].config.masking_keys
    built.restart(102, config={"masking_keys": replace(keys, private_key=b"s" * 32)})
    with pytest.raises(TooManyFailures, match=r"a public masking key that is not in masking\.pub"):
        run(built, rounds=1)


def test_nodes_without_keys_are_named(federation):
    built = federation(words={"strategy": {"weighting": "equal"}})
    with pytest.raises(FederationError, match=r"the nodes of clients \[0, 1, 2, 3\] have no key"):
        run(built, rounds=1)


def mask_request(built, node, registered, run="r", threshold=5, parties=()):
    """Return the first request of a masked round, as a coordinator could make it up for client 0."""
    layout, clients = built.engine.layout, tuple(sorted(registered))
    nonce, length = b"n" * 16, layout.num_parameters
    encoding = protected(built, SECAGG, range(9), rounds=1)[0].privacy_guarantee.encoding_digest
    session = Session(
        run=b"r",
        round=1,
        nonce=nonce,
        clients=clients,
        threshold=threshold,
        length=length,
        encoding=encoding,
        parties=parties,
    )
    return NodeRequest(
        kind=RequestKind.MASK,
        run=run,
        round=1,
        id="1",
        settings={**built.order, "privacy": SECAGG, "population": {"num_clients": 9, "rounds": 1, "num_parties": 2}},
        clients=(0,),
        state_rounds=(0,),
        layout=layout.digest,
        content=pack_mask_request({0: encode(session)}, registered),
    )


@pytest.mark.parametrize(
    ("threshold", "parties", "reason"),
    [
        (5, (), "the parties of the session are not those of the registered keys"),
        (5, (0, *range(1, 9)), "the parties of the session are not those of the registered keys"),
        (5, (0, *(1,) * 8), "threshold 5 of 2 parties"),
    ],
    ids=["no parties", "false parties", "true parties"],
)
def test_one_colluding_node_with_eight_clients_does_not_unmask_another(federation, threshold, parties, reason):
    built = masked(federation, clients=((0,), (1,)))
    remote_scenario(built.engine)
    victim, colluder = (built.sites[node].config.masking_keys.public_key for node in (101, 102))
    registered = {0: victim, **dict.fromkeys(range(1, 9), colluder)}
    response = built.sites[101].respond(mask_request(built, 101, registered, threshold=threshold, parties=parties))
    assert not response.content.arrays
    assert reason in (response.refusal.reason if response.refusal else response.failures[0].reason)


def test_a_node_accepts_only_its_own_clients_under_its_key_and_only_sessions_of_the_run(federation):
    built = masked(federation, clients=((0,), (1,)))
    remote_scenario(built.engine)
    current, other = (built.sites[node].config.masking_keys.public_key for node in (101, 102))
    fine = mask_request(built, 101, {0: current, 1: other}, threshold=2, parties=(0, 1))
    assert built.sites[101].respond(fine).content.arrays
    for request, reason in (
        (mask_request(built, 101, {0: current, 1: other, 2: current}, threshold=2, parties=(0, 1, 0)), "masking.pub"),
        (
            mask_request(built, 101, {0: current, 1: other}, run="s", threshold=2, parties=(0, 1)),
            "belongs to another run",
        ),
    ):
        response = built.sites[101].respond(request)
        assert not response.content.arrays
        assert reason in (response.refusal.reason if response.refusal else response.failures[0].reason)


def test_a_node_refuses_a_threshold_that_one_colluding_node_could_split_unless_its_policy_accepts_it(federation):
    words = {**SECAGG, "threshold": 2}
    three = ((0,), (1,), (2,))
    with pytest.raises((FedlearnError, TooManyFailures), match="0 of 3 parties responded, fewer than threshold 2"):
        run(masked(federation, clients=three), words, rounds=1)
    policy = {"required_privacy": RequiredPrivacy(max_colluding_nodes=0)}
    assert len(run(masked(federation, clients=three, policy=policy), words, rounds=1)) == 1


def change_requests(built, node, change):
    """Change the settings of privacy in the requests to a node, as a coordinator could do."""
    respond = built.grid.nodes[node]

    def changed(payload):
        asked = NodeRequest.unpack(payload)
        privacy = change(asked) if asked.kind == RequestKind.MASK else {}
        settings = {**asked.settings, "privacy": {**(asked.settings.get("privacy") or {}), **privacy}}
        return respond(replace(asked, settings=settings).pack() if privacy else payload)

    built.grid.nodes[node] = changed


@pytest.mark.parametrize(
    ("privacy", "stage"),
    [
        ({"noise_multiplier": 0.001}, "all"),
        ({"noise_multiplier": 0.001}, "mask"),
        pytest.param({"noise_multiplier": 0.9}, "all", marks=pytest.mark.slow),
        pytest.param({"bits": 12}, "mask", marks=pytest.mark.slow),
        pytest.param({"clip_norm": 0.5}, "mask", marks=pytest.mark.slow),
        pytest.param({"threshold": 3}, "mask", marks=pytest.mark.slow),  # three nodes have this threshold anyway
    ],
)
def test_all_clients_of_a_sum_add_the_noise_on_which_each_of_them_relies(federation, privacy, stage):
    """Ask one of three nodes for other noise: the sum is not opened, since each node relies on the others' noise."""
    built = masked(federation, clients=((0,), (1,), (2,)))
    change_requests(built, 103, lambda asked: privacy if stage == "all" or asked.shared.arrays else {})
    if privacy == {"threshold": 3}:
        assert len(run(built, NOISY, rounds=1)) == 1
    else:
        with pytest.raises((SecAggAborted, TooManyFailures, FedlearnError)):
            run(built, NOISY, rounds=1)


NAMES = {101: "north", 102: "south", 103: "west", 104: "east"}


def named_sites(*names, **settings):
    return RunSites(site_of=NAMES.get, names=names, min_sites=len(names), waits_for_disconnected=True, **settings)


@pytest.mark.parametrize("fault", ["none", "silent", "raises"])
def test_a_site_that_is_not_named_is_no_party_of_a_sum(federation, fault):
    """Compare the sum of three named sites with and without a fourth node."""
    built = masked(
        federation, clients=((0,), (1,), (2,), (3,)), sites=named_sites("north", "south", "west"), run="four"
    )
    asked = []

    def fourth(data):
        asked.append(data)
        raise RuntimeError("the scanner is offline")

    built.grid.nodes[104] = None if fault == "silent" else fourth
    built.sites.pop(104)
    *_, last = run(built, rounds=2)
    alone = masked(federation, clients=((0,), (1,), (2,)), sites=named_sites("north", "south", "west"), run="three")
    *_, expected = run(alone, rounds=2)
    assert np.array_equal(last.state.params_D, expected.state.params_D)
    assert asked == []


def test_a_site_that_joins_late_is_no_party_because_the_guarantee_is_for_the_sites_of_the_start(federation):
    sites = replace(named_sites("north", "south", "west", "east"), min_sites=3, settle_s=0.0)
    built = masked(federation, clients=((0,), (1,), (2,), (3,)), sites=sites)
    late = built.grid.nodes.pop(104)
    built.engine.open()
    built.sites.pop(104)  # the number of parties at the start is three
    strategy, local = protected(built, SECAGG, built.engine.clients, rounds=4)
    built.engine.set_privacy(SECAGG, rounds=4)
    state = start(strategy, built.engine.initial_parameters(1), built.engine, seed=1)
    rounds = federate(strategy, built.engine, state, schedule=Schedule(rounds=4), local=local)
    assert next(rounds).num_updates == 3
    built.grid.nodes[104] = late
    until = time.monotonic() + 60
    while 3 not in built.engine.membership.members_by_client():
        built.engine.exchange.update_members(1)
        assert time.monotonic() < until
        time.sleep(0.02)
    assert [done.num_updates for done in rounds] == [3, 3, 3]
    assert built.engine.clients == (0, 1, 2)
