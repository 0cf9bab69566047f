"""Secure aggregation as a privacy setting: charged events, refused combinations, and the header of a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
from needs import needs

from fedlearn import CompositionError, Schedule, SettingError, federate, serial, start
from fedlearn.core.privacy_guarantee import Release
from fedlearn.core.privacy_ledger import WHOLE_ORDERS, Event, Ledger, RenyiEvent, event_history
from fedlearn.core.records import ExampleDP
from fedlearn.privacy.accounting import epsilon_bounds
from fedlearn.privacy.mechanisms import distributed, secagg
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer, linear_problem
from strategies import fedavg, fedmedian

needs("dp_accounting", reason="needs fedlearn[privacy]")

pytest.importorskip("cryptography", reason="needs fedlearn[privacy]")
EQUAL = fedavg(weighting="equal")


def run(mechanism, rounds=4, planned=4):
    data = linear_problem(num_clients=10)
    population = Population(clients=range(10), rounds=planned)
    strategy, local = mechanism.protect(EQUAL, LOCAL_SETTINGS, population)
    engine = serial(data, LinearTrainer(3))
    state = start(strategy, engine.trainer.init(1), engine, seed=1)
    return strategy, list(federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=local))


def test_what_is_booked_costs_at_least_what_the_integer_noise_does():
    from dp_accounting.rdp import compute_epsilon

    from fedlearn.privacy.secagg.masked_sum import Masking

    _, rounds = run(distributed(noise_multiplier=2.0))
    release = Masking(clip_norm=1.0, noise="skellam", noise_multiplier=2.0, bits=14, cohort=10).noisy_sum(10)
    orders = np.arange(2, 200)
    exact = compute_epsilon(orders, 4 * release.rdp(orders), 1e-5)[0]
    shown = rounds[-1].privacy
    assert shown.pld is None
    assert exact <= shown.value < 1.02 * exact
    assert [done.privacy.value for done in rounds] == sorted(done.privacy.value for done in rounds)


def test_what_is_known_by_renyi_divergences_alone_gets_no_tighter_claim():
    stated = RenyiEvent(WHOLE_ORDERS, tuple(order / (2 * 2.0**2) for order in WHOLE_ORDERS))
    known, gaussian = (epsilon_bounds(event_history({event: 3}), delta=1e-5) for event in (stated, Event(2.0)))
    assert known.pld is None
    assert known.rdp >= gaussian.rdp > gaussian.pld
    saved = Ledger().charge_federation(stated, 3)
    assert Ledger.from_json(json.loads(json.dumps(saved.to_json()))) == saved


def test_discrete_gaussian_noise_is_accounted_at_all_orders_and_skellam_noise_at_whole_orders():
    """Check that each kind of noise states the orders of its theorem."""
    found = {}
    for noise in ("skellam", "discrete_gaussian"):
        strategy, _ = run(distributed(noise_multiplier=1.0, noise=noise), rounds=1)
        ledger = strategy.privacy_guarantee.charge(Ledger(), Release(round=1, clients=(0,)))
        ((event, _),) = ledger.client_history(0)
        found[noise] = epsilon_bounds(event_history({event: 10}), delta=1e-5).value
        assert (2.5 in event.orders) == (noise == "discrete_gaussian")
    assert epsilon_bounds(event_history({Event(1.0): 10}), delta=1e-5).pld < found["discrete_gaussian"]
    assert found["discrete_gaussian"] < 0.98 * found["skellam"]


def test_a_budget_finds_the_noise_and_stops_the_run_before_it_is_passed():
    strategy, rounds = run(distributed(epsilon=12.0), rounds=9)
    assert len(rounds) == 4
    assert rounds[-1].privacy.value == pytest.approx(12.0, rel=1e-3)
    assert rounds[-1].privacy.value <= 12.0
    assert strategy.privacy_guarantee.noise_multiplier > 0.5


def test_sums_alone_promise_no_epsilon_and_keep_metrics_and_counts_at_home():
    strategy, rounds = run(secagg())
    assert [done.privacy for done in rounds] == [None] * 4
    assert strategy.privacy_guarantee.delta is None
    assert all(done.metrics == {} and done.num_examples is None for done in rounds)
    plain = serial(linear_problem(num_clients=10), LinearTrainer(3))
    state = start(EQUAL, plain.trainer.init(1), plain, seed=1)
    *_, last = federate(EQUAL, plain, state, schedule=Schedule(rounds=4), local=LOCAL_SETTINGS)
    assert np.abs(rounds[-1].state.params_D - last.state.params_D).max() < 1e-3


@pytest.mark.parametrize("mechanism", [secagg(), distributed(noise_multiplier=1.0)], ids=lambda item: item.kind)
def test_what_cannot_be_masked_soundly_is_refused_with_the_fix(mechanism):
    with pytest.raises(CompositionError, match="weighting=equal"):
        mechanism.validate(fedavg(), LOCAL_SETTINGS)
    with pytest.raises(CompositionError, match="mean"):
        mechanism.validate(fedmedian(), LOCAL_SETTINGS)
    with pytest.raises(CompositionError, match="privacy=example"):
        mechanism.validate(EQUAL, replace(LOCAL_SETTINGS, example_dp=ExampleDP()))


@pytest.mark.parametrize("noise", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_noise_multiplier_out_of_range_is_refused(noise):
    with pytest.raises(SettingError, match="noise_multiplier"):
        distributed(noise_multiplier=noise)
