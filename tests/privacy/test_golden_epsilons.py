"""Epsilons agree with numbers measured with dp-accounting 0.6 and Opacus 1.6.

At small sampling rates they are lower than those of dp-accounting, whose grid of 1e-4 is coarse there. A finer grid of
dp-accounting gives the same numbers, see `test_small_rates_are_between_both_roundings_of_a_fine_grid`.
"""

import math
from math import ceil, log2, sqrt

import pytest
from needs import needs

from fedlearn.core.privacy_ledger import Event, event_history
from fedlearn.privacy.accounting import calibrate_noise_multiplier, calibrate_num_rounds, epsilon_bounds
from fedlearn.privacy.mechanisms.dp_ftrl import toeplitz_sensitivity, tree_sensitivity

needs("dp_accounting", reason="needs fedlearn[privacy]")


MNIST, CIFAR = 256 / 60000, 512 / 50000


def poisson(noise, rate, rounds):
    return event_history({Event(noise, "poisson", rate): rounds}) if rate < 1 else event_history({Event(noise): rounds})


TABLE = [  # rate, noise, rounds, delta, RDP, PLD
    (MNIST, 1.1, 14062, 1e-5, 2.596556, 2.381686),
    (MNIST, 1.1, 14100, 1e-5, 2.600343, 2.385211),
    (MNIST, 1.3, 3515, 1e-5, 0.954430, 0.864459),
    (0.01, 4.0, 10000, 1e-5, 1.035490, 0.946999),
    (1e-4, 1.0, 1000, 1e-6, 0.585818, 0.014894),
    (1e-4, 1.0, 1000, 1e-5, 0.450372, 0.011186),
    (1e-4, 1.0, 1000, 1e-8, 0.856710, 0.024045),
    (0.01, 1.0, 1000, 1e-5, 2.101367, 1.828244),
    (0.01, 0.5, 1000, 1e-5, 15.472133, 13.360826),
    (0.1, 1.0, 100, 1e-5, 7.903850, 7.046603),
    (0.1, 2.0, 200, 1e-3, 2.647232, 2.302822),
    (CIFAR, 1.5, 9765, 1e-5, 3.506443, 3.229263),
    (1, 1.0, 1, 1e-5, 4.728507, 4.377178),
    (1, 1.0, 10, 1e-5, 19.053598, 17.856587),
    (1, 10.0, 100, 1e-5, 4.728507, 4.377178),
    (1, 5.0, 100, 1e-5, 10.725510, 9.997256),
    (2231e-6, 0.669, 4000, 10**-6.6, 4.00928, 3.26823),  # Andrew et al. 2021, Table 1
]


@pytest.mark.parametrize(("rate", "noise", "rounds", "delta", "rdp", "pld"), TABLE)
def test_epsilon_is_the_golden_one_by_both_accountants(rate, noise, rounds, delta, rdp, pld):
    found = epsilon_bounds(poisson(noise, rate, rounds), delta=delta)
    assert found.pld == pytest.approx(pld, rel=1e-3)
    assert found.rdp == pytest.approx(rdp, rel=1e-3)
    assert found.pld <= found.rdp
    assert found.value == found.pld


QUICK = (7, 9, 12)  # rows of TABLE for the default run
OPACUS = [pytest.param(*row, marks=() if i in QUICK else pytest.mark.slow) for i, row in enumerate(TABLE[:-1])]


@pytest.mark.framework
@pytest.mark.parametrize(("rate", "noise", "rounds", "delta", "rdp", "pld"), OPACUS)
def test_opacus_agrees(rate, noise, rounds, delta, rdp, pld):
    accountants = pytest.importorskip("opacus.accountants", reason="needs fedlearn[torch]")
    found = epsilon_bounds(poisson(noise, rate, rounds), delta=delta)
    prv = accountants.PRVAccountant()
    prv.history = [(noise, rate, rounds)]
    theirs = prv.get_epsilon(delta=delta)
    assert theirs == pytest.approx(found.pld, abs=2e-2)
    assert found.pld <= theirs <= found.pld + 0.011


USERS = [  # clients, cohort, noise, rounds, RDP, PLD at delta = clients^-1.1
    (1e5, 100, 1, 100, 0.7246, 0.0679),
    (1e5, 100, 1, 1000, 0.7738, 0.1669),
    (1e5, 100, 1, 10000, 0.8836, 0.5167),
    (1e6, 10, 1, 100, 0.5038, 0.000467),
    (1e6, 10, 1, 10000, 0.5072, 0.004347),
    (1e6, 1000, 1, 1000, 0.9848, 0.2108),
    (1e6, 10000, 1, 10000, 7.8076, 7.3103),
    (1e6, 1000, 3, 100, 0.1627, 0.0126),
    (1e6, 1000, 3, 10000, 0.1996, 0.1385),
    (1e9, 1000, 1, 1000, 0.6899, 0.000235),
]


@pytest.mark.parametrize(("clients", "cohort", "noise", "rounds", "rdp", "pld"), USERS)
def test_the_user_level_table_is_reproduced(clients, cohort, noise, rounds, rdp, pld):
    found = epsilon_bounds(poisson(float(noise), cohort / clients, rounds), delta=clients**-1.1)
    assert found.rdp == pytest.approx(rdp, abs=1e-3)
    assert found.pld == pytest.approx(pld, abs=6e-5 if pld > 0.01 else 1e-6, rel=1e-3)


@pytest.mark.slow  # dp-accounting takes 3 to 16 s for a fine grid
@pytest.mark.parametrize(
    ("rate", "noise", "rounds", "delta", "grid"),
    [
        (1e-4, 1.0, 1000, 1e-6, 2e-6),
        (1e-4, 1.0, 1000, 1e-8, 2e-6),
        (1e-5, 1.0, 100, 1e6**-1.1, 1e-7),
        (1e-3, 3.0, 10000, 1e6**-1.1, 1e-5),
    ],
)
def test_small_rates_are_between_both_roundings_of_a_fine_grid(rate, noise, rounds, delta, grid):
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    settings = {"sampling_prob": rate, "value_discretization_interval": grid}
    lower, upper = (
        from_gaussian_mechanism(noise, pessimistic_estimate=up, **settings).self_compose(rounds) for up in (False, True)
    )
    found = epsilon_bounds(poisson(noise, rate, rounds), delta=delta).pld
    assert lower.get_epsilon_for_delta(delta) <= found <= upper.get_epsilon_for_delta(delta) * (1 + 2e-4)


FIXED_SIZE = [  # multiplier at sensitivity 2 C, rate, rounds, delta, epsilon, RDP, epsilon before, lower bound
    (1.0, 0.1, 200, 1e-3, 8.4324, 9.5367, 16.1093, 7.0962),
    (2.0, 0.1, 200, 1e-3, 2.6147, 2.9712, 6.0251, 2.3028),
    (1.0, 0.01, 1000, 1e-5, 2.1989, 2.4556, 3.5761, 1.8282),
    (0.5, 0.1, 100, 1e-5, 34.1720, 37.9869, 83.9369, 31.3710),
    (1.0, 1e-4, 1000, 1e-6, 0.0179, 0.5862, 0.5863, 0.0149),
    (3.0, 0.3, 20, 1e-5, 2.0317, 2.2372, 4.2669, 1.9865),
]


@pytest.mark.parametrize(("noise", "rate", "rounds", "delta", "pld", "rdp", "before", "lower"), FIXED_SIZE)
def test_sampling_without_replacement_is_accounted_at_twice_the_sensitivity(
    noise, rate, rounds, delta, pld, rdp, before, lower
):
    """Check cohorts of a fixed size.

    Replacing a client's clipped update moves the sum by 2 C, so noise of z C is a multiplier of z / 2. The lower bound
    is the epsilon of the data on which all other clients send -C; `test_loss_distributions` recomputes it.
    """
    found = epsilon_bounds(event_history({Event(noise, "fixed_size", rate): rounds}), delta=delta)
    assert found.pld == pytest.approx(pld, rel=5e-4, abs=5e-5)
    assert found.rdp == pytest.approx(rdp, rel=1e-3)
    assert lower <= found.value < found.rdp <= before


def test_both_accountants_read_a_replacement_alike():
    """Compare both accountants of fedlearn.

    dp-accounting's own differ by a factor of two: for the same event, RDP gives 4.7285 and PLD 9.9973.
    """
    replaced = epsilon_bounds(event_history({Event(1.0 / 2): 1}), delta=1e-5)
    assert replaced.pld == pytest.approx(9.997256, rel=1e-6)
    assert replaced.pld <= replaced.rdp <= 1.1 * replaced.pld


@pytest.mark.parametrize(("sigma", "value"), [(2.0, 1.993091), (0.5, 9.997256), (1.0, 4.377178)])
def test_one_gaussian_is_exact(sigma, value):
    assert epsilon_bounds(event_history({Event(sigma): 1}), delta=1e-5).pld == pytest.approx(value, abs=1e-6)


def test_composition_adds_up():
    once, twice = poisson(1.0, 0.1, 50), poisson(1.0, 0.1, 100)
    assert event_history({Event(1.0, "poisson", 0.1): 50 + 50}) == twice
    assert epsilon_bounds(twice, delta=1e-5).rdp == pytest.approx(7.903850, rel=1e-3)
    assert epsilon_bounds(once, delta=1e-5).value < epsilon_bounds(twice, delta=1e-5).value
    assert epsilon_bounds(poisson(10.0, 1, 100), delta=1e-5) == epsilon_bounds(poisson(1.0, 1, 1), delta=1e-5)
    mixed = event_history({Event(1.0, "poisson", 0.1): 50, Event(2.0): 1})
    parts = [
        epsilon_bounds(poisson(1.0, 0.1, 50), delta=1e-5).value,
        epsilon_bounds(event_history({Event(2.0): 1}), delta=1e-5).value,
    ]
    assert max(parts) < epsilon_bounds(mixed, delta=1e-5).value < sum(parts)
    assert epsilon_bounds((), delta=1e-5).value == 0


CALIBRATED = [  # epsilon, rate, rounds, delta, noise by RDP, by PLD
    (1.0, 0.01, 1000, 1e-5, 1.513122, 1.414631),
    (3.0, MNIST, 14062, 1e-5, 1.014001, 0.968421),
    (8.0, CIFAR, 9765, 1e-5, 0.923071, 0.888306),
    pytest.param(2.0, 1e-4, 1000, 1e-6, 0.594983, 0.460716, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("target", "rate", "rounds", "delta", "by_rdp", "by_pld"), CALIBRATED)
def test_calibration_finds_the_golden_noise_and_keeps_the_budget(target, rate, rounds, delta, by_rdp, by_pld):
    def planned(noise):
        return [poisson(noise, rate, rounds)]

    assert calibrate_noise_multiplier(planned, epsilon=target, delta=delta, method="rdp") == pytest.approx(
        by_rdp, rel=1e-3
    )
    noise = calibrate_noise_multiplier(planned, epsilon=target, delta=delta)
    assert noise == pytest.approx(by_pld, rel=1e-3)
    assert target * (1 - 1e-3) < epsilon_bounds(planned(noise)[0], delta=delta).value <= target


@pytest.mark.parametrize(("target", "sigma"), [(1, 3.730632), (5, 0.891868), (8, 0.600229), (10, 0.499889)])
def test_calibration_of_one_gaussian_is_exact_where_the_classical_formula_breaks_the_promise(target, sigma):
    found = calibrate_noise_multiplier(lambda noise: [event_history({Event(noise): 1})], epsilon=target, delta=1e-5)
    assert found == pytest.approx(sigma, rel=1e-5)
    classical = sqrt(2 * math.log(1.25 / 1e-5)) / 10
    assert epsilon_bounds(event_history({Event(classical): 1}), delta=1e-5).value == pytest.approx(10.393882, rel=1e-5)


def test_the_rounds_that_a_budget_allows():
    def after(rounds):
        return [poisson(1.0, 0.01, rounds)]

    rounds = calibrate_num_rounds(after, epsilon=1.8283, delta=1e-5, max_rounds=5000)
    assert rounds == 1000
    assert (
        epsilon_bounds(after(rounds)[0], delta=1e-5).value
        <= 1.8283
        < epsilon_bounds(after(rounds + 1)[0], delta=1e-5).value
    )
    assert calibrate_num_rounds(after, epsilon=1.8283, delta=1e-5, max_rounds=600) == 600
    assert calibrate_num_rounds(after, epsilon=1e-3, delta=1e-5, max_rounds=600) == 0


TREE = [(1, 1, 4.728507), (1, 16, 12.301691), (1, 100, 15.175420), (1, 1000, 19.053598), (1, 1024, 20.259187)]
TREE += [(1, 2048, 21.444852), (4, 1000, 3.617100)]


@pytest.mark.parametrize(("noise", "rounds", "rdp"), TREE)
def test_tree_aggregation_costs_one_gaussian_a_level(noise, rounds, rdp):
    moved = tree_sensitivity(rounds, rounds)  # for clients that participate once
    assert moved**2 == pytest.approx(ceil(log2(rounds + 1)))
    assert epsilon_bounds(event_history({Event(noise / moved): 1}), delta=1e-5).rdp == pytest.approx(rdp, rel=1e-3)


@pytest.mark.framework
def test_toeplitz_sensitivities_are_the_golden_ones_and_those_of_jax_privacy():
    toeplitz = pytest.importorskip("jax_privacy.matrix_factorization.toeplitz", reason="needs fedlearn[ftrl]")
    optimal = [1, 0.5, 0.375, 0.3125, 0.273438, 0.246094, 0.225586, 0.209473]
    theirs = toeplitz.optimal_max_error_strategy_coefs(8)
    assert [float(c) for c in theirs] == pytest.approx(optimal, abs=1e-6)
    assert toeplitz_sensitivity(theirs, 8, 8) ** 2 == pytest.approx(1.718379, rel=1e-5)
    assert toeplitz_sensitivity(theirs[:4], 4, 16) ** 2 == pytest.approx(5.953125, rel=1e-5)
    for separation, rounds in [(1, 5), (3, 10), (4, 16), (7, 20)]:
        square = float(toeplitz.minsep_sensitivity_squared(theirs, separation, n=rounds))
        assert toeplitz_sensitivity(theirs, separation, rounds) ** 2 == pytest.approx(square, rel=1e-5)
