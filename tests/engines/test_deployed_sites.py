"""A run asks only its sites: no other node can refuse, delay, fail or change it. Messages name sites, never ids."""

import random
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fedlearn import Schedule, federate, start
from fedlearn.runner.instantiation import build
from fedlearn.testing import LOCAL_SETTINGS

pytest.importorskip("flwr", reason="the extra flower is not installed")

from fedlearn.core.records import FailureStage
from fedlearn.protocol import exchange, membership
from fedlearn.protocol.membership import FederationError
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.refusals import Refusal, RefusalCode
from fedlearn.protocol.sites import RunSites

NAMES = {101: "north", 102: "south", 103: "west", 104: "east"}
CLIENTS = ((0,), (1,), (2,), (3,))
ID = re.compile(r"\b(node )?(10[1-9])\b")


def sites(*names, **settings):
    settings = {"min_sites": len(names), "waits_for_disconnected": True, **settings}
    return RunSites(site_of=NAMES.get, names=names or None, **settings)


def rounds_of(built, rounds=3, **schedule):
    """Return the rounds of a run."""
    strategy = build(built.settings["strategy"], "strategy", allow=built.allow)
    state = start(strategy, built.engine.initial_parameters(1), built.engine, seed=1)
    plan = Schedule(rounds=rounds, **schedule)
    return federate(strategy, built.engine, state, schedule=plan, local=LOCAL_SETTINGS)


def asked(built, node):
    """Replace a node by one that records the kinds of its requests, and answers them."""
    kinds, answer = [], built.grid.nodes[node]

    def record(data):
        kinds.append("any request")
        return answer(data)

    built.grid.nodes[node] = record
    return kinds


def refusing(built, node):
    built.restart(node, policy={"scenarios": {}})


def silent(built, node):
    built.grid.nodes[node] = None


def broken(built, node):
    built.grid.nodes[node] = lambda data: b"not a message"


def raising(built, node):
    def fail(data):
        raise RuntimeError("/srv/patients/north.csv is not there")

    built.grid.nodes[node] = fail


def claiming(built, node):
    """Describe the client of another site."""
    built.restart(node, config={"clients": (0,)})


def leaving(built, node):
    threading.Timer(0.05, built.grid.nodes.pop, (node, None)).start()


def late(built, node):
    there = built.grid.nodes.pop(node)
    threading.Timer(0.05, built.grid.nodes.__setitem__, (node, there)).start()


FAULTS = (refusing, silent, broken, raising, claiming, leaving, late)


def with_faults(federation, seed, masking=False, **settings):
    """Return the model of a run for north and south, while west and east have random faults."""
    built = federation(clients=CLIENTS, sites=sites("north", "south"), run=f"run-{seed}", masking=masking, **settings)
    rng = random.Random(seed)
    recorded = {node: asked(built, node) for node in (103, 104)}
    for node in (103, 104):
        rng.choice(FAULTS)(built, node)
    began = time.monotonic()
    done = list(rounds_of(built))[-1]
    assert time.monotonic() - began < 15, "a node that is not named delays the run"
    assert recorded == {103: [], 104: []}
    assert done.failures == ()
    return done.state.params_D


def test_nodes_that_are_not_named_do_not_change_the_model(federation):
    alone = federation(clients=CLIENTS[:2], sites=sites("north", "south"), run="alone")
    expected = list(rounds_of(alone))[-1].state.params_D
    for seed in range(3):
        assert np.array_equal(with_faults(federation, seed), expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_random_nodes_that_are_not_named_do_not_change_the_model(federation, seed):
    alone = federation(clients=CLIENTS[:2], sites=sites("north", "south"), run="alone")
    assert np.array_equal(with_faults(federation, seed), list(rounds_of(alone))[-1].state.params_D)


@pytest.mark.parametrize("fault", [refusing, broken, claiming], ids=lambda fault: fault.__name__)
def test_a_refusal_counts_only_when_too_few_sites_remain(federation, fault, caplog):
    lines = []
    built = federation(clients=CLIENTS, sites=sites(min_sites=3, report=lines.append))
    fault(built, 104)
    built.grid.shut(104)
    threading.Timer(0.3, built.grid.gates[104].set).start()  # client 0 is the client of north
    built.engine.open()
    assert built.engine.clients == (0, 1, 2)
    assert "refused: east" in lines[-1]
    assert not ID.search("\n".join(lines) + "\n".join(caplog.messages))
    built = federation(clients=CLIENTS, sites=sites(min_sites=4), run="all")
    fault(built, 104)
    with pytest.raises(FederationError, match=r"of 4 sites joined.*; refused: east") as caught:
        built.engine.open()
    assert not ID.search(str(caught.value))


@pytest.mark.parametrize(
    ("stage", "code", "is_postponed"),
    [
        (FailureStage.NODE, RefusalCode.CONNECTION, True),
        (FailureStage.REQUEST, RefusalCode.BUSY, True),
        (FailureStage.RESPONSE, RefusalCode.CONNECTION, False),
        (FailureStage.POLICY, RefusalCode.POLICY, False),
        (FailureStage.NODE, RefusalCode.SCENARIO, False),
    ],
)
def test_a_site_with_a_transient_problem_is_asked_again_and_is_not_refused(
    federation, monkeypatch, stage, code, is_postponed
):
    monkeypatch.setattr(membership, "POSTPONE_INTERVAL_S", -1.0)
    built = federation(clients=CLIENTS[:2], sites=sites("north", "south"))
    request = NodeRequest(kind=RequestKind.HELLO, run="r", round=0, id="1", settings={})
    built.engine.exchange._admit(NodeResponse.refuse(request, Refusal(stage=stage, code=code, detail="why")), 102)
    members = built.engine.membership
    assert (102 in members.postponed, 102 in members.refused) == (is_postponed, not is_postponed)
    assert (102 in members.nodes_to_greet([102])) == is_postponed
    assert members.report() == [line for line in members.report() if "site south: " in line]
    assert built.engine.exchange._start_state(60.0, 0.0).is_hopeless != is_postponed


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["messenger", "busy"])
def test_a_transient_problem_of_a_site_is_no_refusal(federation, cause, monkeypatch, caplog):
    monkeypatch.setattr(membership, "POSTPONE_INTERVAL_S", 0.05)
    built = federation(clients=CLIENTS[:2], sites=sites("north", "south"))
    answer, count = built.grid.nodes[102], 0

    def recover(data):
        nonlocal count
        count += 1
        if count > 2:
            return answer(data)
        if cause == "busy":
            refusal = Refusal(stage=FailureStage.REQUEST, code=RefusalCode.BUSY)
            return NodeResponse.refuse(NodeRequest.unpack(data), refusal).pack()
        raise RuntimeError("the trainer of this node does not respond")

    built.grid.nodes[102] = recover
    built.engine.open()
    assert built.engine.clients == (0, 1)
    assert "site south is asked again" in caplog.text


def test_a_site_with_another_model_is_refused_and_the_others_go_on(federation):
    built = federation(clients=CLIENTS, sites=sites(min_sites=2))
    builder = built.sites[103].builder
    builder._with_operator_settings = lambda settings: {**settings, "num_features": 5}
    built.engine.open()
    assert built.engine.clients == (0, 1, 3)
    assert "site west (client 2) does not fit site north (client 0)" in built.engine.membership.refused[103]


def test_the_start_names_the_missing_sites_and_begins_at_the_deadline_with_enough(federation, monkeypatch):
    monkeypatch.setattr(exchange, "REPORT_INTERVAL_S", 0.1)
    lines = []
    built = federation(
        clients=CLIENTS,
        sites=sites("north", "south", "west", min_sites=2, report=lines.append),
        join_timeout=1.0,
    )
    silent(built, 102)
    there = built.grid.nodes.pop(103)
    threading.Timer(0.5, built.grid.nodes.__setitem__, (103, there)).start()
    built.engine.open()
    assert built.engine.clients == (0, 2)
    assert lines[0] == "waiting    1 of 3 sites joined; no answer yet: south; not connected: west"
    assert "no answer yet: south" in lines[-1]


def test_too_few_sites_at_the_deadline_are_named(federation):
    built = federation(clients=CLIENTS, sites=sites("north", "south", "west"), join_timeout=0.5)
    silent(built, 102)
    del built.grid.nodes[103]
    with pytest.raises(
        FederationError, match=r"1 of 3 sites joined; no answer yet: south; not connected: west"
    ) as caught:
        built.engine.open()
    assert "expected  at least 3 of these sites" in str(caught.value)
    assert "silent    site south" in str(caught.value)


def test_a_start_with_enough_sites_waits_a_short_time_for_a_silent_one(federation):
    built = federation(clients=CLIENTS, sites=sites("north", "south", min_sites=1, settle_s=0.3), join_timeout=60)
    silent(built, 102)
    began = time.monotonic()
    built.engine.open()
    assert time.monotonic() - began < 20


def test_a_site_that_leaves_fails_in_its_rounds_by_name_and_a_late_one_takes_part(federation):
    built = federation(clients=CLIENTS[:3], sites=sites("north", "south", "west", min_sites=2, settle_s=0.0))
    there = built.grid.nodes.pop(103)
    built.engine.open()
    rounds = rounds_of(built, rounds=4)
    built.grid.nodes[103] = there
    next(rounds)
    until = time.monotonic() + 60
    while built.engine.clients != (0, 1, 2):
        built.engine.exchange.update_members(1)
        built.engine._add_clients()
        assert time.monotonic() < until
        time.sleep(0.02)
    assert next(rounds).cohort == (0, 1, 2)
    del built.grid.nodes[102]
    built.engine.membership.expected.discard(1)  # otherwise the round waits for south until its deadline
    (failure,) = next(rounds).failures  # the default allows one failure
    assert (failure.client, failure.stage, failure.reason) == (1, "node", "site south is not connected")


def test_the_failures_of_a_round_name_the_site(federation, caplog):
    built = federation(clients=CLIENTS, sites=sites(), deadline=1.0)
    rounds = rounds_of(built)
    raising(built, 101)
    silent(built, 102)
    broken(built, 103)
    built.restart(104, policy={"strategies": {}})
    with pytest.raises(FederationError, match="has 0 updates") as caught:
        next(rounds)
    for number, name in enumerate(NAMES.values()):
        assert re.search(rf"client {number}, at stage \w+: site {name}: ", str(caught.value))
    assert not ID.search(str(caught.value) + "\n".join(caplog.messages))


def test_the_next_site_draws_the_initial_parameters_if_the_first_fails(federation):
    built = federation(clients=CLIENTS, sites=sites(min_sites=4))
    built.engine.open()
    expected = built.engine.initial_parameters(1)
    broken(built, 101)
    assert np.array_equal(built.engine.initial_parameters(1), expected)


def test_a_resumed_run_waits_for_the_sites_that_took_part(federation):
    built = federation(clients=CLIENTS, sites=sites(rejoining=frozenset({"north", "west"}), min_sites=1))
    there = built.grid.nodes.pop(103)
    threading.Timer(0.5, built.grid.nodes.__setitem__, (103, there)).start()
    built.engine.open()
    assert 2 in built.engine.clients


def test_masks_are_for_the_named_sites_only(federation):
    pytest.importorskip("cryptography", reason="the extra privacy is not installed")
    built = federation(clients=CLIENTS, masking=True, sites=sites("north", "south", "west"))
    recorded = asked(built, 104)
    built.engine.open()
    assert built.engine.num_parties == 3
    assert built.engine.clients == (0, 1, 2)
    assert recorded == []


def test_two_runs_with_other_sites_at_the_same_time_do_not_change_each_other(federation):
    alone = [
        list(rounds_of(federation(clients=CLIENTS, sites=sites(*pair), run=f"alone-{pair[0]}")))[-1].state.params_D
        for pair in (("north", "south"), ("west", "east"))
    ]
    built = federation(clients=CLIENTS, sites=sites("north", "south"), run="first")
    second = SimpleNamespace(settings=built.settings, allow=built.allow, engine=None)
    second.engine = type(built.engine)(built.grid, built.order, run="second", sites=sites("west", "east"))
    both = [rounds_of(built), rounds_of(second)]
    for _ in range(3):
        last = [next(rounds) for rounds in both]
    assert [done.cohort for done in last] == [(0, 1), (2, 3)]
    assert all(np.array_equal(done.state.params_D, expected) for done, expected in zip(last, alone, strict=True))


def test_a_node_without_a_name_is_a_stranger(federation, caplog):
    built = federation(clients=CLIENTS, sites=RunSites(site_of={101: "north"}.get))
    built.engine.open()
    assert built.engine.clients == (0,)
    built.engine.exchange.grid_client._count("duplicate", 104)
    assert "a node outside this run" in caplog.text
    assert not ID.search("\n".join(caplog.messages))


def test_a_request_has_no_name_of_another_site(federation):
    built = federation(clients=CLIENTS, sites=sites("north", "south"))
    seen, answer = [], built.grid.nodes[101]
    built.grid.nodes[101] = lambda data: seen.append(data) or answer(data)
    list(rounds_of(built, rounds=1))
    assert seen
    assert not any(b"south" in data or b"west" in data for data in seen)
