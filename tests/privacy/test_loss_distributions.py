"""Loss distributions are compared with independent numbers: brute force over data sets, and other discretizations."""

from functools import partial
from itertools import product
from math import exp, inf, log

import numpy as np
import pytest
from scipy.special import ndtr

from fedlearn.core.privacy_ledger import EpsilonDeltaEvent, Event, LaplaceEvent, event_history
from fedlearn.privacy.accounting import epsilon_bounds, gaussian_epsilon
from fedlearn.privacy.loss_composition import composed_epsilon
from fedlearn.privacy.loss_distributions import loss_distributions
from fedlearn.privacy.renyi_divergences import ORDERS, divergences

OUTPUTS = np.linspace(-20, 30, 50_001)  # cells of a one-dimensional release, in units of the sensitivity


def cell_masses(cumulative):
    """Return the probabilities of the cells between `OUTPUTS`, and of the two tails."""
    return np.diff(np.concatenate([[0.0], cumulative(OUTPUTS), [1.0]]))


def mixture(centers, noise):
    """Return the masses of an even mixture of Gaussians."""
    return np.mean([cell_masses(lambda x, c=c: ndtr((x - c) / noise)) for c in centers], axis=0)


def removal(noise, rate):
    """Return the masses of P and Q if a record is removed, and moves the sum from 0 to 1 if it is sampled."""
    absent = mixture([0.0], noise)
    return rate * mixture([1.0], noise) + (1 - rate) * absent, absent


def epsilon_by_rounding_down(pair, count, delta, step):
    """Return a lower bound on epsilon: each cell has one loss, which is rounded down; losses compose by FFT."""
    first, second = pair
    used = (first > 1e-17) & (second > 1e-300)
    losses = np.floor(np.log(first[used] / second[used]) / step).astype(int)
    mass = np.bincount(losses - losses.min(), first[used])
    size = 2 ** int(np.ceil(np.log2(count * len(mass))))
    assert size <= 2**24
    composed = np.maximum(np.fft.irfft(np.fft.rfft(mass, size) ** count, size), 0)
    values = (np.arange(size) + count * losses.min()) * step
    kept = values > 0
    low, high = 0.0, float(values[kept][-1])
    for _ in range(60):
        middle = (low + high) / 2
        profile = np.sum(np.maximum(0, -np.expm1(np.minimum(middle - values[kept], 0))) * composed[kept])
        low, high = (middle, high) if profile > delta else (low, middle)
    return low


def profile_of(first, second, epsilon):
    """Return delta at an epsilon, also a negative one."""
    return float(np.maximum(first - exp(epsilon) * second, 0).sum())


def claimed_profile(event, epsilon, step=2**-9):
    """Return the delta that the distributions of one release claim, the largest of all directions."""
    deltas = []
    for part in loss_distributions(event, step):
        losses = step * (part.lowest + np.arange(len(part.mass)))
        deltas.append(part.infinite + np.sum(np.maximum(0, -np.expm1(np.minimum(epsilon - losses, 0))) * part.mass))
    return max(deltas)


def fixed_size_release(others, value, size, noise):
    """Return the output distribution of a fixed-size cohort from ``others`` and one client with ``value``."""
    from itertools import combinations

    return mixture([sum(cohort) for cohort in combinations([*others, value], size)], noise)


def fixed_size_pairs(number=4):
    """Yield pairs of neighbors: data sets of values in [-1/2, 1/2], in which the value of one client differs."""
    rng = np.random.default_rng(0)
    corners = [-0.5, 0.5]
    for others in product(corners, repeat=number - 1):
        yield others, -0.5, 0.5
    for _ in range(6):
        yield tuple(rng.uniform(-0.5, 0.5, number - 1)), *rng.uniform(-0.5, 0.5, 2)


@pytest.mark.parametrize("noise", [0.4, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_pair_for_a_fixed_size_dominates_all_neighbors_at_each_epsilon(noise, size):
    event = Event(noise, "fixed_size", size / 4)
    for others, old, new in fixed_size_pairs():
        first, second = (fixed_size_release(others, value, size, noise) for value in (old, new))
        for epsilon in (-3.0, -1.0, -0.3, -0.05, 0.0, 0.05, 0.3, 1.0, 3.0, 6.0):
            claim = claimed_profile(event, epsilon)
            assert profile_of(first, second, epsilon) <= claim + 1e-9
            assert profile_of(second, first, epsilon) <= claim + 1e-9


@pytest.mark.parametrize("noise", [0.4, 1.0])
def test_the_pair_for_a_fixed_size_is_attained_at_each_epsilon(noise):
    """Check that the bound of one release is exact: extreme data sets reach it, one for each sign of epsilon."""
    event, others = Event(noise, "fixed_size", 0.5), (-0.5, -0.5, -0.5)
    low, high = (fixed_size_release(others, value, 2, noise) for value in (-0.5, 0.5))
    for epsilon in (-3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0):
        reached = max(profile_of(low, high, epsilon), profile_of(high, low, epsilon))
        assert claimed_profile(event, epsilon) == pytest.approx(reached, abs=1e-6)


COMPOSED = [
    (3.0, 0.3, 20, 1e-5),
    (1.0, 0.9, 4, 1e-5),
    (1.0, 0.1, 20, 1e-3),
    pytest.param(1.0, 0.1, 200, 1e-3, marks=pytest.mark.slow),
    pytest.param(0.5, 0.1, 20, 1e-5, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("noise", "rate", "rounds", "delta"), COMPOSED)
def test_a_fixed_size_costs_no_less_than_the_worst_data_set_and_little_more(noise, rate, rounds, delta):
    """Compare with data on which the bound of one release is exact: all other values are at one end."""
    claim = composed_epsilon([(Event(noise, "fixed_size", rate), rounds)], delta)
    pair = removal(noise, rate)
    reached = max(epsilon_by_rounding_down(p, rounds, delta, 2e-4) for p in (pair, pair[::-1]))
    assert reached <= claim <= 1.25 * reached


@pytest.mark.parametrize("size", [1, 2])
def test_composed_cohorts_of_a_fixed_size_cost_no_less_than_any_neighbors(size):
    noise, rounds, delta = 0.8, 5, 1e-4
    claim = composed_epsilon([(Event(noise, "fixed_size", size / 4), rounds)], delta)
    for others, old, new in list(fixed_size_pairs())[::3]:
        pair = [fixed_size_release(others, value, size, noise) for value in (old, new)]
        for first, second in (pair, pair[::-1]):
            assert epsilon_by_rounding_down((first, second), rounds, delta, 1e-3) <= claim


POISSON = [
    (2.0, 0.3, 20, 1e-6),
    pytest.param(1.0, 0.1, 100, 1e-5, marks=pytest.mark.slow),
    pytest.param(0.6, 0.02, 50, 1e-5, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("noise", "rate", "rounds", "delta"), POISSON)
def test_poisson_sampling_costs_the_brute_force_epsilon(noise, rate, rounds, delta):
    claim = composed_epsilon([(Event(noise, "poisson", rate), rounds)], delta)
    pair = removal(noise, rate)
    reached = max(epsilon_by_rounding_down(p, rounds, delta, 1e-4) for p in (pair, pair[::-1]))
    assert reached <= claim <= reached + 1e-4 * rounds + 1e-3 * reached


EVENTS = [
    Event(1.1, "poisson", 0.01),
    Event(0.5, "poisson", 0.2),
    Event(3.0, "poisson", 0.9),
    Event(1.0, "fixed_size", 0.05),
    Event(0.7, "fixed_size", 0.5),
    LaplaceEvent(2.0),
    LaplaceEvent(1.0, "poisson", 0.1),
    LaplaceEvent(1.0, "fixed_size", 0.1),
    EpsilonDeltaEvent(0.37),
]


@pytest.mark.parametrize("event", EVENTS, ids=str)
@pytest.mark.parametrize("count", [1, 30])
def test_a_coarser_grid_never_lowers_epsilon_and_the_coarse_bound_is_close(event, count):
    fine = composed_epsilon([(event, count)], 1e-5)
    coarse = composed_epsilon([(event, count)], 1e-5, coarse=True)
    assert fine * (1 - 1e-9) <= coarse <= 1.2 * fine


@pytest.mark.parametrize("event", EVENTS, ids=str)
@pytest.mark.parametrize("step", [2**-4, 2**-9])
def test_both_distributions_of_a_release_are_distributions(event, step):
    for part in loss_distributions(event, step):
        assert part.mass.min() >= 0
        assert part.mass.sum() + part.infinite == pytest.approx(1, abs=1e-9)
        losses = step * (part.lowest + np.arange(len(part.mass)))
        assert np.sum(part.mass * np.exp(-losses)) <= 1 + 1e-9, "Q has at most the probability 1"


def test_laplace_noise_with_a_fixed_size_costs_what_one_release_is_known_to_cost():
    event = LaplaceEvent(1.0, "fixed_size", 0.2)
    assert composed_epsilon([(event, 1)], 1e-9) == pytest.approx(log(1 + 0.2 * (exp(1) - 1)), abs=1e-3)
    assert composed_epsilon([(event, 50)], 1e-5) < 50 * log(1 + 0.2 * (exp(1) - 1)) / 2


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (5.0, 100), (30.0, 3000), (100.0, 100_000)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8, 1e-10])
def test_composition_on_the_grid_has_the_closed_form_of_plain_gaussians(noise, rounds, delta):
    exact = gaussian_epsilon(noise / rounds**0.5, delta)
    assert exact * (1 - 1e-9) <= composed_epsilon([(Event(noise), rounds)], delta) <= exact * (1 + 3e-4)


def test_one_gaussian_has_the_profile_of_balle_and_wang():
    for noise, delta in product((0.05, 0.5, 3.0, 50.0), (1e-2, 1e-6, 1e-12)):
        epsilon = gaussian_epsilon(noise, delta)
        profile = partial(
            lambda e, z: ndtr(1 / (2 * z) - e * z) - np.exp(e + np.log(ndtr(-1 / (2 * z) - e * z))), z=noise
        )
        assert profile(epsilon) <= delta * (1 + 1e-6)
        assert epsilon == 0 or profile(epsilon * (1 - 1e-6)) > delta * (1 - 1e-6)


@pytest.mark.parametrize(("noise", "rate"), [(1.1, 0.01), (0.5, 0.2), (2.0, 0.7)])
def test_divergences_of_sampled_gaussians_are_those_of_brute_force(noise, rate):
    """Compare whole orders with the binomial sum, and the fixed-size pair with a sum over outputs."""
    orders = [int(order) for order in ORDERS if order == int(order) and order <= 40]
    found = dict(zip(ORDERS, divergences(Event(noise, "poisson", rate)), strict=True))
    for order in orders:
        k = np.arange(order + 1)
        binomials = np.cumsum(np.log(np.concatenate([[1.0], (order - k[:-1]) / k[1:]])))
        terms = binomials + (order - k) * np.log1p(-rate) + k * log(rate) + k * (k - 1) / (2 * noise**2)
        assert found[order] == pytest.approx(np.logaddexp.reduce(terms) / (order - 1), rel=1e-8)
    outputs, width = np.linspace(0.5, 20.5, 200_001)[:-1] + 5e-5, 1e-4
    absent = np.exp(-(outputs**2) / (2 * noise**2)) * width / (noise * np.sqrt(2 * np.pi))
    ratio = 1 - rate + rate * np.exp((2 * outputs - 1) / (2 * noise**2))
    equal = (1 - rate) * (2 * ndtr(1 / (2 * noise)) - 1)
    found = dict(zip(ORDERS, divergences(Event(noise, "fixed_size", rate)), strict=True))
    for order in (1.5, 2.0, 3.0, 8.5):
        moment = np.sum(absent * (ratio**order + ratio ** (1 - order))) + equal
        assert found[order] == pytest.approx(log(moment) / (order - 1), rel=1e-5)


def test_a_huge_loss_is_finite_by_divergences_or_infinite():
    assert composed_epsilon([(Event(0.01, "poisson", 0.5), 1)], 1e-5) == inf
    found = epsilon_bounds(event_history({Event(0.01, "poisson", 0.5): 1}), delta=1e-5)
    assert 1000 < found.value < inf
