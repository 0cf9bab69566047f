"""Claims of the papers on asynchronous federated learning, on problems with known solutions and a virtual clock.

Shapes: D parameters laid flat.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fedlearn import (
    CompositionError,
    Schedule,
    SettingError,
    Strategy,
    everyone,
    federate,
    mean,
    serial,
    start,
    uniform,
)
from fedlearn.algorithm import Asynchrony, hinge, polynomial, unweighted
from fedlearn.loop import VirtualClockEngine, constant, lognormal
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer, linear_problem
from strategies import fedasync, fedavg, fedbuff


def steps(strategy, system, number, *, num_clients=6, local=LOCAL_SETTINGS, **schedule):
    data = linear_problem(num_clients=num_clients)
    engine = VirtualClockEngine(serial(data, LinearTrainer(3)), system, lambda client: len(data.train(client)))
    state = start(strategy, LinearTrainer(3).init(1), engine, seed=1)
    return list(federate(strategy, engine, state, schedule=Schedule(rounds=number, **schedule), local=local))


def loss(params_D, num_clients=6):
    data, trainer = linear_problem(num_clients=num_clients), LinearTrainer(3)
    parts = [data.train(client) for client in data.clients]
    return np.mean([np.mean((trainer.predict(params_D, part.x)[:, 0] - part.y) ** 2) for part in parts])


def time_to(target, rounds, num_clients):
    return next(done.clock for done in rounds if loss(done.state.params_D, num_clients) <= target)


def test_weights_of_stale_updates_are_those_of_the_papers():
    tau = np.arange(8)
    assert np.allclose(polynomial(0.5)(tau), 1 / np.sqrt(1 + tau), rtol=1e-15)  # FedBuff; FedAsync with a = 0.5
    assert np.allclose(polynomial(2.0)(tau), (1.0 + tau) ** -2, rtol=1e-15)
    by_hand = [1, 1, 1, 1, 1, 1 / (10 * 1 + 1), 1 / (10 * 2 + 1), 1 / (10 * 3 + 1)]
    assert np.allclose(hinge(10, 4)(tau), by_hand, rtol=1e-15)
    assert unweighted(tau).tolist() == [1] * 8


def test_with_equal_speed_and_everyone_in_the_buffer_fedbuff_without_staleness_is_fedavg_bit_for_bit():
    buffered = steps(fedbuff(buffer_size=6, concurrency=6, exponent=0.0), constant(), 5)
    averaged = steps(fedavg(weighting="equal"), constant(), 5)
    for ours, theirs in zip(buffered, averaged, strict=True):
        assert np.array_equal(ours.state.params_D, theirs.state.params_D)
        assert ours.clock == pytest.approx(theirs.clock)
        assert (ours.bytes_up, ours.bytes_down, ours.metrics) == (theirs.bytes_up, theirs.bytes_down, theirs.metrics)


def test_fedbuff_steps_by_the_mean_of_its_buffer_weighted_by_staleness():
    seen = []

    def watched(staleness_K):
        seen.append(staleness_K.tolist())
        return polynomial(0.5)(staleness_K)

    rule = Asynchrony(buffer_size=2, concurrency=4, staleness_weight=watched)
    rounds = steps(Strategy(select=everyone(), aggregate=mean(weighting="equal"), asynchrony=rule), lognormal(), 40)
    data, stale = linear_problem(), 0
    for (before, after), ages in zip(pairwise(rounds), seen[1:], strict=True):
        under_way = {item.client: item.request for item in before.state.in_flight}
        if not under_way.keys() >= set(after.cohort) or len(set(after.cohort)) < 2:
            continue  # a request was sent and completed within this step
        orders = [under_way[client] for client in after.cohort]
        assert ages == [after.number - order.round for order in orders]
        triples = zip(orders, after.cohort, ages, strict=True)
        moved_KD = [weighted_update(data, *item) for item in triples]
        expected_D = before.state.params_D + np.mean(moved_KD, axis=0)
        assert np.allclose(after.state.params_D, expected_D, rtol=0, atol=1e-6)
        stale += max(ages) > 0
    assert stale >= 2, "no update was stale"


def weighted_update(data, order, client, age):
    (updates,) = serial(data, LinearTrainer(3)).fit(order, fedavg(), [client])
    return (1 + age) ** -0.5 * updates.delta_KD[0]


def test_fedasync_mixes_in_the_model_that_arrives_by_algorithm_1():
    alpha, exponent = 0.6, 0.5
    rounds = steps(fedasync(mixing=alpha, exponent=exponent, mu=0.0, concurrency=4), lognormal(), 10)
    data, checked = linear_problem(), 0
    for before, after in pairwise(rounds):
        (client,) = after.cohort
        order = next((item.request for item in before.state.in_flight if item.client == client), None)
        if order is None:
            continue
        (updates,) = serial(data, LinearTrainer(3)).fit(order, fedavg(), [client])
        arrived_D = order.params_D + updates.delta_KD[0]
        share = alpha * (after.number - order.round + 1) ** -exponent
        expected_D = (1 - share) * before.state.params_D + share * arrived_D
        assert np.allclose(after.state.params_D, expected_D, rtol=0, atol=1e-6)
        checked += after.number > order.round
    assert checked >= 3, "no update was stale"


def test_with_stragglers_fedbuff_reaches_a_target_in_less_virtual_time_than_fedavg():
    heavy, num_clients = lognormal(sigma=1.5), 20
    target = 1.05 * loss(steps(fedavg(weighting="equal"), constant(), 40, num_clients=20)[-1].state.params_D, 20)
    averaged = steps(fedavg(weighting="equal", clients_per_round=10), heavy, 60, num_clients=num_clients)
    buffered = steps(fedbuff(buffer_size=3, concurrency=10), heavy, 200, num_clients=num_clients)
    assert 2 * time_to(target, buffered, 20) < time_to(target, averaged, 20)


def test_down_weighting_the_stale_keeps_fedasync_closer_to_the_optimum_than_mixing_all_alike():
    system = lognormal(sigma=2.0)
    ends = {}
    for kind in ("polynomial", "constant"):
        rounds = steps(fedasync(staleness=kind, mixing=0.9), system, 150, num_clients=20)
        ends[kind] = np.mean([loss(done.state.params_D, 20) for done in rounds[100:]])
    assert ends["polynomial"] < ends["constant"]


def test_no_client_gets_the_same_model_twice_and_none_two_orders_at_a_time():
    rounds = steps(fedbuff(buffer_size=4, concurrency=3), lognormal(sigma=2.0), 15)
    for done in rounds:
        at_work = [item.client for item in done.state.in_flight]
        assert len(set(at_work)) == len(at_work) <= 3
    landed = [client for done in rounds for client in done.cohort]
    assert set(landed) == set(range(6)), "a client was never selected"


def test_everybody_at_work_is_a_buffer_that_closes_when_nobody_is_left():
    rounds = steps(fedbuff(buffer_size=6, concurrency=6), constant(dropout=0.4), 3, max_failures=0.9)
    assert all(0 < done.num_updates <= 6 for done in rounds)
    assert any(done.num_updates < 6 for done in rounds)


def test_a_failure_takes_no_place_in_the_buffer_and_frees_its_slot():
    rounds = steps(fedbuff(buffer_size=2, concurrency=3), lognormal(dropout=0.3), 10, max_failures=0.9)
    assert any(done.failures for done in rounds)
    assert all(done.num_updates == 2 for done in rounds)


def test_a_buffer_larger_than_the_population_is_refused():
    with pytest.raises(SettingError, match=r"strategy.buffer_size is 7"):
        steps(fedbuff(buffer_size=7), constant(), 1)


@pytest.mark.parametrize(
    ("build", "setting"),
    [
        (lambda: fedbuff(buffer_size=0), "buffer_size"),
        (lambda: fedbuff(concurrency=0), "concurrency"),
        (lambda: fedbuff(exponent=-1), "exponent"),
        (lambda: fedasync(mixing=0), "mixing"),
        (lambda: fedasync(staleness="linear"), "staleness"),
        (lambda: fedasync(grace=-1), "grace"),
    ],
)
def test_a_setting_out_of_range_is_refused(build, setting):
    with pytest.raises(SettingError, match=f"^{setting} is"):
        build()


def test_cohorts_and_privacy_claims_are_refused_because_there_are_no_rounds():
    rule = Asynchrony(buffer_size=1, concurrency=2)
    with pytest.raises(CompositionError, match="requests to idle clients"):
        Strategy(select=uniform(2), asynchrony=rule)
    with pytest.raises(CompositionError, match="accounted"):
        replace(fedbuff(), privacy_guarantee="a claim")
