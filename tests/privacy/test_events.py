"""Events beyond Gaussian noise: closed forms, composition in one ledger, exact JSON."""

import json
import math
import warnings
from itertools import product

import numpy as np
import pytest
from needs import needs

from fedlearn import SettingError
from fedlearn.core.privacy_ledger import (
    EpsilonDeltaEvent,
    Event,
    LaplaceEvent,
    Ledger,
    RenyiEvent,
    event_history,
)
from fedlearn.privacy.accounting import calibrate_noise_multiplier, epsilon_bounds, max_epsilon_bounds

needs("dp_accounting", reason="needs fedlearn[privacy]")

GAUSSIAN = Event(2.0)
EVENTS = [
    GAUSSIAN,
    Event(1.0, "poisson", 0.1),
    Event(1.0, "fixed_size", 0.1),
    LaplaceEvent(4.0),
    LaplaceEvent(1.0, "poisson", 0.1),
    LaplaceEvent(1.0, "fixed_size", 0.1),
    EpsilonDeltaEvent(0.3),
    EpsilonDeltaEvent(0.2, 1e-7),
    RenyiEvent((2.0, 8.0, 32.0), (0.05, 0.2, 0.8)),
]


def cost(counts, delta=1e-5):
    return epsilon_bounds(event_history(counts), delta=delta)


def laplace_delta(epsilon, scale):
    """Return the privacy profile of one Laplace release of sensitivity 1, in closed form."""
    return max(0.0, 1 - math.exp((epsilon - 1 / scale) / 2)) if epsilon < 1 / scale else 0.0


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("delta", [1e-1, 1e-3, 1e-6])
def test_one_laplace_release_costs_the_closed_form(scale, delta):
    found = cost({LaplaceEvent(scale): 1}, delta).value
    exact = 1 / scale + 2 * math.log1p(-delta)
    assert laplace_delta(exact, scale) == pytest.approx(delta)
    assert exact - 1e-9 <= found <= exact + 1e-3


@pytest.mark.parametrize("count", [2, 10])
def test_k_laplace_releases_cost_what_the_sum_of_their_losses_says(count):
    """Compare with a sum over the distribution of the privacy loss, ``clip(1 - 2 |x - 1| ..., -e, e)`` per release."""
    scale, rng = 2.0, np.random.default_rng(1)
    draws = rng.laplace(0, scale, (2_000_000 // count, count))
    loss_N = ((np.abs(draws + 1) - np.abs(draws)) / scale).sum(axis=1)
    found = cost({LaplaceEvent(scale): count}, 1e-2)
    profile = np.mean(np.maximum(0, 1 - np.exp(found.value - loss_N)))
    assert profile == pytest.approx(1e-2, rel=0.05)
    assert found.value < count / scale, "tighter than basic composition"
    assert found.rdp >= found.pld


@pytest.mark.parametrize(("epsilon", "count", "delta"), [(0.1, 100, 1e-5), (0.5, 20, 1e-4), (1.0, 3, 1e-6)])
def test_pure_releases_cost_no_more_than_basic_and_advanced_composition(epsilon, count, delta):
    found = cost({EpsilonDeltaEvent(epsilon): count}, delta)
    advanced = epsilon * math.sqrt(2 * count * math.log(1 / delta)) + count * epsilon * math.expm1(epsilon)
    assert found.value <= min(advanced, count * epsilon) * (1 + 1e-3)
    optimal = optimal_composition(epsilon, count, delta)
    assert optimal * (1 - 1e-9) <= found.value <= optimal + count * 1e-3
    assert found.rdp >= optimal * (1 - 1e-9)


def optimal_composition(epsilon, count, delta):
    """Compute Kairouz, Oh, Viswanath 2015, Theorem 3.3: the least (k - 2 i) epsilon with a small enough delta."""

    def delta_of(i):
        terms = (
            math.comb(count, j) * (math.exp((count - j) * epsilon) - math.exp((count - 2 * i + j) * epsilon))
            for j in range(i)
        )
        return sum(terms) / (1 + math.exp(epsilon)) ** count

    exact = min((count - 2 * i) * epsilon for i in range(count // 2 + 1) if delta_of(i) <= delta)
    low, high = max(0.0, exact - 2 * epsilon), exact  # between two corners the curve is known, too
    for _ in range(60):
        middle = (low + high) / 2
        losses = [(count - 2 * j) * epsilon for j in range(count + 1)]
        weights = [
            math.comb(count, j) * math.exp((count - j) * epsilon) / (1 + math.exp(epsilon)) ** count
            for j in range(count + 1)
        ]
        profile = sum(w * max(0.0, 1 - math.exp(middle - loss)) for w, loss in zip(weights, losses, strict=True))
        low, high = (middle, high) if profile > delta else (low, middle)
    return high


def test_stated_deltas_add_up_and_a_claim_below_them_is_infinite():
    event = EpsilonDeltaEvent(0.2, 1e-6)
    assert cost({event: 1}, 1e-6 + 1e-12).value == pytest.approx(0.2, abs=1e-3)
    assert cost({event: 1}, 0.9e-6).value == math.inf
    assert cost({event: 20}, 1.9e-5).value == math.inf
    assert 0 < cost({event: 20}, 2.1e-5).value <= 20 * 0.2
    alone = cost({GAUSSIAN: 1}, 1e-5).value
    assert cost({GAUSSIAN: 1, event: 1}, 1.1e-5).value <= cost({GAUSSIAN: 1, event: 1}, 1e-5).value
    assert alone < cost({GAUSSIAN: 1, event: 1}, 1e-5).value <= cost({GAUSSIAN: 1}, 9e-6).value + 0.2 + 1e-3


@pytest.mark.parametrize("sampling", ["poisson", "fixed_size"])
@pytest.mark.parametrize("rate", [0.01, 0.2, 1.0])
def test_sampled_laplace_is_amplified_no_more_than_is_proved(sampling, rate):
    found = cost({LaplaceEvent(1.0, sampling, rate): 1}, 1e-9)
    proved = math.log1p(rate * math.expm1(1.0))
    assert found.value == pytest.approx(proved, abs=2e-3)
    many = cost({LaplaceEvent(1.0, sampling, rate): 50}, 1e-5).value
    assert found.value < many <= 50 * proved * (1 + 1e-3)
    assert many <= cost({LaplaceEvent(1.0): 50}, 1e-5).value * (1 + 1e-3)


def test_stated_divergences_hold_for_smaller_orders_and_no_larger_ones():
    stated = RenyiEvent((2.0, 32.0), (0.1, 0.5))
    curve = min(bound + math.log1p(-1 / a) - math.log(1e-5 * a) / (a - 1) for a, bound in [(2.0, 0.1), (32.0, 0.5)])
    assert cost({stated: 1}).pld is None
    assert cost({stated: 1}).value == pytest.approx(curve, rel=1e-6)
    falling = RenyiEvent((2.0, 32.0), (0.7, 0.5))
    assert cost({falling: 1}).value == pytest.approx(cost({RenyiEvent((32.0,), (0.5,)): 1}).value)


def test_a_mixture_costs_at_least_each_part_and_at_most_their_sum():
    parts = {LaplaceEvent(4.0): 3, Event(2.0): 2, EpsilonDeltaEvent(0.1): 5, Event(1.0, "poisson", 0.05): 10}
    whole = cost(parts, 2e-5).value
    for event, count in parts.items():
        assert cost({event: count}, 2e-5).value < whole
    assert whole <= sum(cost({event: count}, 5e-6).value for event, count in parts.items())


@pytest.mark.parametrize(("first", "more"), [*product(EVENTS, EVENTS)], ids=lambda event: type(event).__name__)
def test_one_more_event_never_lowers_epsilon(first, more):
    fixed = {type(event) is Event and event.sampling == "fixed_size" for event in (first, more)}
    before, after = cost({first: 3}), cost({first: 4} if first == more else {first: 3, more: 1})
    assert after.value >= before.value * (1 - 1e-9), fixed
    assert after.rdp >= before.rdp * (1 - 1e-9)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_ledger_of_any_event_survives_json_exactly(event):
    ledger = Ledger().charge_federation(event, 3).charge_federation(GAUSSIAN).charge_clients({5: (event, 2)})
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again == ledger
    assert cost(dict(again.federation)) == cost(dict(ledger.federation))


@pytest.mark.parametrize(
    "damaged",
    [
        {"federation": [[1.0, "poisson", 0.1, 3]], "groups": []},
        {"federation": [{"type": "gaussian", "noise_multiplier": 1.0, "count": 3}], "groups": []},
        {"federation": [{"type": "luck", "count": 3}], "groups": []},
        {"federation": [{"type": "epsilon_delta", "epsilon": 0.0, "delta": 0.0, "count": 1}], "groups": []},
        {"federation": [{"type": "epsilon_delta", "epsilon": math.nan, "delta": 0.0, "count": 1}], "groups": []},
        {"federation": [{"type": "epsilon_delta", "epsilon": 1.0, "delta": 0.0, "count": 0}], "groups": []},
        {"federation": [{"type": "epsilon_delta", "epsilon": 1.0, "delta": 0.0, "count": True}], "groups": []},
        {"federation": [{"type": "epsilon_delta", "epsilon": 1.0, "delta": 0.0, "count": 1, "more": 1}], "groups": []},
        {"federation": [], "groups": [{"spent": [], "clients": [1]}, {"spent": [], "clients": [1]}]},
        {"federation": []},
        [],
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_damaged_ledger_is_refused_and_never_cheaper(damaged):
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own message
        Ledger.from_json(damaged)


def test_equal_rows_of_a_ledger_add_up():
    row = {"type": "epsilon_delta", "epsilon": 1.0, "delta": 0.0, "count": 2}
    assert Ledger.from_json({"federation": [row, row], "groups": []}).federation == ((EpsilonDeltaEvent(1.0), 4),)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LaplaceEvent(0.0),
        lambda: LaplaceEvent(math.nan),
        lambda: LaplaceEvent(1.0, "luck"),
        lambda: LaplaceEvent(1.0, "poisson", 0.0),
        lambda: Event(1.0, "none", 0.5),
        lambda: EpsilonDeltaEvent(-1.0),
        lambda: EpsilonDeltaEvent(math.inf),
        lambda: EpsilonDeltaEvent(1.0, 1.0),
        lambda: EpsilonDeltaEvent(1.0, math.nan),
        lambda: RenyiEvent((), ()),
        lambda: RenyiEvent((1.0,), (0.1,)),
        lambda: RenyiEvent((4.0, 2.0), (0.1, 0.2)),
        lambda: RenyiEvent((2.0, 4.0), (0.1,)),
        lambda: RenyiEvent((2.0,), (-0.1,)),
        lambda: RenyiEvent((2.0,), (math.nan,)),
    ],
)
def test_an_event_out_of_range_cannot_be_built(make):
    with pytest.raises(SettingError):
        make()


def test_clients_with_any_events_pay_as_much_as_the_one_that_pays_most():
    rng = np.random.default_rng(0)
    histories = [
        event_history({EVENTS[i]: int(n) for i, n in zip(rng.permutation(9)[:3], rng.integers(1, 9, 3), strict=True)})
        for _ in range(20)
    ]
    found = max_epsilon_bounds(histories, delta=1e-4)
    assert found.rdp == pytest.approx(max(epsilon_bounds(history, delta=1e-4).rdp for history in histories))
    loss = [event_history({LaplaceEvent(3.0): n}) for n in (1, 5, 3)]
    assert max_epsilon_bounds(loss, delta=1e-4).value == epsilon_bounds(loss[1], delta=1e-4).value


def test_laplace_noise_is_found_for_a_budget():
    noise = calibrate_noise_multiplier(lambda z: [event_history({LaplaceEvent(z): 10})], epsilon=2.0, delta=1e-5)
    assert cost({LaplaceEvent(noise): 10}).value <= 2.0
    assert cost({LaplaceEvent(noise * 0.999): 10}).value > 2.0


@pytest.mark.parametrize("sampling", ["poisson", "fixed_size", "none"])
def test_less_noise_costs_more_down_to_no_noise_without_an_error(sampling):
    rate = 1.0 if sampling == "none" else 0.1
    noises = (1.0, 0.1, 0.021, 0.0199, 1e-3, 1e-6, 0.9e-6, 1e-30, 1e-300)
    with warnings.catch_warnings(action="error"):
        found = [epsilon_bounds(((Event(noise, sampling, rate), 3),), delta=1e-5) for noise in noises]
    for bounds in ([item.rdp for item in found], [item.value for item in found]):
        assert bounds == sorted(bounds)
        assert bounds[-1] == math.inf
        assert all(bound < math.inf for bound in bounds[:6])


@pytest.mark.parametrize("event", [LaplaceEvent, lambda noise: EpsilonDeltaEvent(1 / noise)])
def test_a_large_pure_epsilon_is_added_up_without_an_error(event):
    noises = (1.0, 0.01, 0.0034, 0.0033, 1e-4, 1e-9, 1e-300)
    with warnings.catch_warnings(action="error"):
        found = [cost({event(noise): 3}).value for noise in noises]
    assert found == sorted(found)
    assert found == pytest.approx([3 / noise for noise in noises], rel=1e-4)
