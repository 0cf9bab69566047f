import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ive, logsumexp

pytest.importorskip("cryptography", reason="random numbers need the extra privacy")
from fedlearn.core.random import Purpose
from fedlearn.privacy.secagg.cost import NoisySum, discrete_gaussian_cdp, skellam_rdp
from fedlearn.privacy.secagg.discrete_noise import MAX_STD, RandomStream, conditional_round, draw_noise


def stream(seed=0):
    return RandomStream.from_seed(seed, Purpose.NOISE, round=1)


def probabilities(kind, std, k):
    """Return probabilities from SciPy's own distribution, or from the definition."""
    if kind == "skellam":
        return stats.skellam.pmf(k, std**2 / 2, std**2 / 2)
    everything = np.arange(-int(40 * std) - 40, int(40 * std) + 41)
    return np.exp(-(k**2) / (2 * std**2)) / np.exp(-(everything**2) / (2 * std**2)).sum()


@pytest.mark.parametrize("kind", ["skellam", "discrete_gaussian"])
@pytest.mark.parametrize("std", [0.5, 1.0, 3.7, 40.0])
def test_noise_follows_its_law(kind, std):
    size = 400_000
    drawn = draw_noise(kind, std, size, stream())
    edge = int(3.5 * std) + 1
    k = np.arange(-edge, edge + 1)
    expected = size * probabilities(kind, std, k)
    counts = np.array([np.count_nonzero(drawn == value) for value in k])
    rest = size - expected.sum()
    statistic = np.sum((counts - expected) ** 2 / expected) + (size - counts.sum() - rest) ** 2 / rest
    assert stats.chi2.ppf(1e-7, len(k)) < statistic < stats.chi2.ppf(1 - 1e-7, len(k))


@pytest.mark.parametrize("kind", ["skellam", "discrete_gaussian"])
@pytest.mark.parametrize("std", [1.0, 30.0, 5000.0, MAX_STD])
def test_noise_has_its_variance_and_its_tails(kind, std):
    drawn = draw_noise(kind, std, 1_000_000, stream(1)).astype(np.float64)
    assert drawn.std() == pytest.approx(std, rel=0.01)
    assert abs(drawn.mean()) < 5 * std / 1000
    assert np.mean(np.abs(drawn) > 3 * std) == pytest.approx(2 * stats.norm.sf(3), rel=0.1 if std > 1 else 1)


def test_streams_are_repeatable_when_seeded_and_never_otherwise():
    assert np.array_equal(stream(3).uint64(10), stream(3).uint64(10))
    assert not np.array_equal(stream(3).uint64(10), stream(4).uint64(10))
    assert not np.array_equal(RandomStream.from_system().uint64(10), RandomStream.from_system().uint64(10))
    uniform = stream().uniform(100_000)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-6


@settings(deadline=None)
@given(st.integers(1, 200), st.floats(0.1, 1000), st.integers(0, 1000))
def test_rounding_keeps_the_norm_and_moves_no_number_by_one(length, norm, seed):
    x_D = np.random.default_rng(seed).normal(size=length)
    x_D *= norm / np.linalg.norm(x_D)
    rounded_D = conditional_round(x_D, norm=norm * 1.0001, stream=stream(seed))
    assert np.linalg.norm(rounded_D) <= norm * 1.0001
    assert np.all(np.abs(rounded_D - x_D) < 1)


def test_rounding_is_right_on_average():
    x_D = np.full(200_000, 0.3)
    rounded_D = conditional_round(x_D, norm=1e9, stream=stream())
    assert set(np.unique(rounded_D)) == {0, 1}
    assert rounded_D.mean() == pytest.approx(0.3, abs=5 * 0.46 / np.sqrt(len(x_D)))


# cost


def test_golden_rows_of_the_distributed_discrete_gaussian():
    accounting = pytest.importorskip("dp_accounting", reason="epsilon needs the extra privacy")
    from dp_accounting.rdp import RdpAccountant

    def epsilon(cdp):
        return RdpAccountant().compose(accounting.ZCDpEvent(cdp**2 / 2)).get_epsilon(1e-5)

    good = discrete_gaussian_cdp(num_clients=100, std=2, l2=20, dimension=1e6)
    assert good == pytest.approx(1.0, abs=1e-9)
    assert epsilon(good) == pytest.approx(4.7285, abs=1e-4)
    too_small = discrete_gaussian_cdp(num_clients=10, std=0.5, l2=5, dimension=1e4)
    assert epsilon(too_small) == pytest.approx(6567, abs=1)


def test_noise_below_one_integer_destroys_the_guarantee_of_sums_of_discrete_gaussians():
    cost = [discrete_gaussian_cdp(num_clients=20, std=std, l2=5 * std, dimension=1e6) for std in (4, 2, 1, 0.7, 0.5)]
    assert cost[:2] == pytest.approx([5 / np.sqrt(20)] * 2, abs=1e-6)
    assert np.all(np.diff(cost[1:]) > 0.1)
    assert cost[4] > 100 * cost[0]


def exact_renyi(order, shift, variance):
    """Compute the Renyi divergence of a Skellam variable from the same variable moved by ``shift``, by summation."""
    k = np.arange(-int(40 * np.sqrt(variance)) - 60, int(40 * np.sqrt(variance)) + 61)
    p, q = (np.log(np.maximum(ive(np.abs(x), variance), 1e-300)) for x in (k, k - shift))
    keep = (p > -600) & (q > -600)
    return float(logsumexp(order * p[keep] + (1 - order) * q[keep]) / (order - 1))


@pytest.mark.parametrize("variance", [4.0, 25.0, 400.0])
@pytest.mark.parametrize("shift", [1, 3])
def test_the_bound_for_skellam_noise_lies_above_the_exact_divergence_and_near_it(variance, shift):
    for order in (1.1, 1.5, 2, 2.5, 3, 5.4, 8, 16):
        exact = exact_renyi(order, shift, variance)
        bound = skellam_rdp(order, variance=variance, l2=shift, l1=shift)
        assert exact <= bound * (1 + 1e-9)
        if order == int(order):
            assert bound <= 1.35 * exact + 4 * (order + shift) * shift / variance**2


def test_with_fine_integers_skellam_noise_costs_what_gaussian_noise_costs():
    for order in (2, 3, 8, 64):
        fine = skellam_rdp(order, variance=1e8, l2=1e4, l1=1e8)
        assert fine == pytest.approx(order / 2, rel=1e-6)


@pytest.mark.parametrize("kind", ["skellam", "discrete_gaussian"])
def test_the_gaussian_that_a_ledger_may_book_instead_costs_no_less_and_hardly_more(kind):
    for std, norm in [(2.0, 9.0), (100.0, 700.0)]:
        release = NoisySum(kind=kind, std=std, norm=norm, min_clients=51, max_clients=100)
        orders = np.arange(2, 513)
        gaussian = orders / (2 * release.equivalent_noise_multiplier**2)
        assert np.all(release.rdp(orders) <= gaussian * (1 + 1e-12))
        assert np.all(gaussian <= release.rdp(orders) * (1.05 if std < 10 else 1.0001))


@pytest.mark.parametrize("kind", ["skellam", "discrete_gaussian"])
def test_more_clients_than_the_quorum_cost_no_more(kind):
    small = NoisySum(kind=kind, std=100.0, norm=700.0, min_clients=51, max_clients=100)
    large = NoisySum(kind=kind, std=100.0, norm=700.0, min_clients=80, max_clients=100)
    assert np.all(large.rdp([1.5, 2, 8]) < small.rdp([1.5, 2, 8]))
    assert np.all(np.diff(small.rdp([1.5, 2, 3, 8, 64])) >= 0)
