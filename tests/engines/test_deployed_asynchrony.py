"""Asynchronous strategies with real node services behind a Flower `Grid`: slow clients delay no other client."""

import numpy as np
import pytest

from fedlearn import Schedule, federate, serial, start
from fedlearn.core import checkpoint
from fedlearn.errors import SettingError
from fedlearn.loop import VirtualClockEngine, lognormal
from fedlearn.runner.instantiation import build
from fedlearn.testing import LOCAL_SETTINGS

pytest.importorskip("flwr", reason="the extra flower is not installed")

EACH = ((0,), (1,), (2,), (3,))


def federated(built, engine, rounds, state=None):
    strategy = build(built.settings["strategy"], "strategy", allow=built.allow)
    built.engine.open()
    state = state or start(strategy, built.engine.initial_parameters(1), engine, seed=1)
    return federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=LOCAL_SETTINGS)


def words(**settings):
    return {"strategy": settings}


def test_a_buffer_of_everyone_without_staleness_is_fedavg_over_real_sites_bit_for_bit(federation):
    settings = words(buffer_size=4, concurrency=4, exponent=0.0, weighting="examples")
    built = federation(strategy="fedbuff", clients=EACH, words=settings)
    averaged = federation(strategy="fedavg", clients=EACH)
    *_, ours = federated(built, built.engine, 3)
    *_, theirs = federated(averaged, averaged.engine, 3)
    assert np.array_equal(ours.state.params_D, theirs.state.params_D)
    assert ours.clock > 0


@pytest.mark.parametrize("strategy", ["fedasync", "fedbuff"])
def test_with_a_model_of_speed_the_deployed_run_is_the_simulated_one_bit_for_bit(federation, strategy):
    built = federation(strategy=strategy, clients=EACH, words=words(concurrency=3))
    built.engine.open()
    system, sizes = lognormal(dropout=0.1), {client: 5 + 4 * client for client in range(4)}
    *_, there = federated(built, VirtualClockEngine(built.engine, system, sizes.get), 6)
    scenario = build(built.settings["scenario"], "scenario", allow=built.allow)
    here_engine = VirtualClockEngine(serial(scenario.data, scenario.trainer), system, sizes.get)
    *_, here = federated(built, here_engine, 6)
    assert np.array_equal(there.state.params_D, here.state.params_D)
    assert there.clock == here.clock
    assert there.failures == here.failures


def test_a_slow_site_delays_nobody_and_its_update_counts_as_stale(federation):
    built = federation(strategy="fedbuff", clients=EACH, words=words(buffer_size=2, concurrency=4))
    rounds = federated(built, built.engine, 40)
    gate = built.grid.shut(101)
    for done in rounds:
        if 0 in done.cohort:
            break
        if done.number == 3:
            gate.set()
            built.grid.until_arrived()
    assert gate.is_set(), "the slow node's update arrived before its gate was open"
    assert 0 in done.cohort
    assert 3 < done.number < 40


def test_a_site_that_does_not_answer_in_time_is_a_failure_and_the_run_goes_on(federation):
    built = federation(strategy="fedbuff", clients=EACH, deadline=3.0, words=words(buffer_size=3, concurrency=4))
    built.engine.open()
    built.grid.nodes[102] = None
    rounds = list(federated(built, built.engine, 2))
    failures = [failure for done in rounds for failure in done.failures]
    assert all((item.client, item.stage, item.reason) == (1, "node", "no response within 3 s") for item in failures)
    assert all(done.num_updates == 3 for done in rounds)


def test_a_site_that_has_gone_is_told_by_name(federation):
    built = federation(strategy="fedbuff", clients=EACH, words=words(buffer_size=3, concurrency=4))
    built.engine.open()
    del built.grid.nodes[104]
    (done,) = federated(built, built.engine, 1)
    assert [(item.client, item.reason) for item in done.failures] == [(3, "site node104 is not connected")]


def test_clients_of_one_site_train_one_after_another_and_all_take_part(federation):
    settings = words(buffer_size=4, concurrency=4)
    built = federation(strategy="fedbuff", clients=((0, 1, 2, 3),), words=settings)
    (done,) = federated(built, built.engine, 1)
    assert done.cohort == (0, 1, 2, 3)
    assert not done.failures


def test_orders_under_way_are_sent_again_after_a_restart(federation, tmp_path):
    settings = words(buffer_size=2, concurrency=4)
    built = federation(strategy="fedbuff", clients=EACH, words=settings)
    rounds = federated(built, built.engine, 2)
    built.grid.shut(101)
    half = list(rounds)[-1].state
    assert 0 in [item.client for item in half.in_flight]
    path = checkpoint.save(tmp_path / "saved", half, built.engine.client_states, layout=built.engine.layout)
    again = federation(strategy="fedbuff", clients=EACH, words=settings)
    again.engine.open()
    state, again.engine.client_states = checkpoint.load(path, again.engine.layout)
    done = next(federated(again, again.engine, 3, state=state))
    assert done.number == 3
    assert done.clock > half.clock
    stale = {item.client: item.request.round for item in half.in_flight}
    left = {item.client: item.request.round for item in done.state.in_flight}
    assert all(client in done.cohort or left[client] == number for client, number in stale.items())


def test_enough_is_refused_where_there_are_no_rounds(federation):
    built = federation(strategy="fedbuff", clients=EACH, min_completed=2, words=words(buffer_size=2))
    with pytest.raises(SettingError, match=r"engine.min_completed is 2"):
        next(federated(built, built.engine, 1))
