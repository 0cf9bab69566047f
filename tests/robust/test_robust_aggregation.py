"""Robust rules have the properties of their papers, on each array library."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies
from fedlearn import SettingError
from fedlearn.algorithm.aggregation import aggregate_updates
from fedlearn.core.records import Updates
from fedlearn.robust import coordinate_median, mean_around_median, robust_aggregation, squared_distances, trimmed_mean

FAR = 1e9


def aggregate(strategy, updates_KD):
    num = len(updates_KD)
    ones = np.ones(num, np.int64)
    updates = Updates(clients_K=np.arange(num), delta_KD=updates_KD, num_examples_K=ones, num_steps_K=ones)
    return np.asarray(aggregate_updates(strategy.aggregate, updates)[0])


def honest_and_malicious(seed, num_honest, num_malicious, size=6):
    """Return honest updates close to each other, and malicious ones at any place and of any size."""
    rng = np.random.default_rng(seed)
    honest_KD = rng.normal(1, 0.2, (num_honest, size))
    scale = 10.0 ** rng.integers(-3, 10, (num_malicious, 1))
    malicious_KD = scale * rng.normal(size=(num_malicious, size))
    rows = rng.permutation(num_honest + num_malicious)
    return honest_KD.astype(np.float32), np.concatenate([honest_KD, malicious_KD])[rows].astype(np.float32)


def within(value_D, honest_KD):
    slack = 1e-5
    return bool(np.all((honest_KD.min(0) - slack <= value_D) & (value_D <= honest_KD.max(0) + slack)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), malicious=st.integers(0, 4), more=st.integers(1, 4))
def test_a_minority_cannot_move_the_median_out_of_the_range_of_the_honest(seed, malicious, more):
    honest_KD, updates_KD = honest_and_malicious(seed, malicious + more, malicious)
    assert within(aggregate(strategies.fedmedian(), updates_KD), honest_KD)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), malicious=st.integers(0, 4))
def test_as_many_as_are_trimmed_cannot_move_the_trimmed_mean_out_of_the_range_of_the_honest(seed, malicious):
    honest_KD, updates_KD = honest_and_malicious(seed, 10 - malicious, malicious)
    assert within(aggregate(strategies.fedtrimmedavg(trim=0.4), updates_KD), honest_KD)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), malicious=st.integers(0, 4), scale=st.floats(4, 1e9))
def test_krum_never_chooses_an_update_far_from_all_honest_ones(seed, malicious, scale):
    rng = np.random.default_rng(seed)
    honest_KD = rng.normal(1, 0.2, (malicious + 3, 6))
    widest = max(np.linalg.norm(a - b) for a in honest_KD for b in honest_KD)
    # farther away than the docstring requires; measured from the mean of the honest updates
    factor = np.sqrt((malicious + 1) / 2) + 1
    away_KD = honest_KD.mean(0) + scale * factor * widest * np.eye(6)[:malicious]
    updates_KD = np.concatenate([away_KD, honest_KD]).astype(np.float32)
    chosen_D = aggregate(strategies.krum(num_malicious=malicious), updates_KD)
    assert any(np.array_equal(chosen_D, item) for item in honest_KD.astype(np.float32))
    if malicious + 3 >= 5:
        kept = malicious + 1
        assert within(aggregate(strategies.krum(num_malicious=malicious, num_to_keep=kept), updates_KD), honest_KD)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), malicious=st.integers(0, 3))
def test_bulyan_stays_about_the_honest_updates_whatever_the_malicious_send(seed, malicious):
    honest_KD, updates_KD = honest_and_malicious(seed, 3 * malicious + 3, malicious)
    moved_D = aggregate(strategies.bulyan(num_malicious=malicious), updates_KD)
    reach = honest_KD.max(0) - honest_KD.min(0)
    assert np.all(moved_D >= honest_KD.min(0) - reach - 1e-5)
    assert np.all(moved_D <= honest_KD.max(0) + reach + 1e-5)


def test_krum_is_fooled_in_one_coordinate_where_bulyan_is_not():
    rng = np.random.default_rng(0)
    honest_KD = rng.normal(0, 0.1, (9, 1000)).astype(np.float32)
    hidden_KD = np.repeat(honest_KD.mean(0, keepdims=True), 2, axis=0)
    hidden_KD[:, 0] += 2.0  # about the distance between honest updates over all 1000 coordinates
    updates_KD = np.concatenate([honest_KD, hidden_KD])
    assert aggregate(strategies.krum(num_malicious=2), updates_KD)[0] > 1.5
    assert aggregate(strategies.bulyan(num_malicious=2), updates_KD)[0] < 0.3


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "bulyan"])
def test_equal_updates_are_kept_exactly_and_one_far_client_hardly_matters(name):
    strategy = getattr(strategies, name)()
    equal_KD = np.full((11, 4), 3.0, np.float32)
    assert aggregate(strategy, equal_KD).tolist() == [3.0] * 4
    equal_KD[4] = FAR
    assert aggregate(strategy, equal_KD).tolist() == [3.0] * 4
    assert aggregate(strategies.fedavg(), equal_KD).max() > FAR / 100


@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
def test_rules_are_the_same_on_every_array_library_and_over_any_number_of_columns(library, monkeypatch):
    xp = pytest.importorskip(library)
    rng = np.random.default_rng(1)
    updates_KD = rng.normal(size=(9, 23)).astype(np.float32)
    by_numpy = [
        np.median(updates_KD, axis=0),
        np.sort(updates_KD, axis=0)[2:7].mean(0),
        ((updates_KD[:, None] - updates_KD) ** 2).sum(-1),
        [column[np.argsort(np.abs(column - np.median(column)))[:4]].mean() for column in updates_KD.T],
    ]
    for most in (9 * 23, 9 * 5, 1):
        monkeypatch.setattr(robust_aggregation, "MAX_ELEMENTS", most)
        given_KD = xp.asarray(updates_KD)
        ours = [
            coordinate_median(given_KD),
            trimmed_mean(given_KD, 2),
            squared_distances(given_KD),
            mean_around_median(given_KD, 4),
        ]
        for item, other in zip(ours, by_numpy, strict=True):
            assert np.allclose(np.asarray(item), other, atol=1e-5)


def test_distances_between_honest_updates_survive_a_malicious_one_far_away():
    near_KD = np.array([[0.0, 0.0], [3e-4, 4e-4], [FAR, -FAR]], np.float32)
    assert squared_distances(near_KD)[0, 1] == pytest.approx(25e-8, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: strategies.krum(num_malicious=2, clients_per_round=6), r"num_malicious is 2\n.*2 num_malicious \+ 3"),
        (lambda: strategies.bulyan(num_malicious=2, clients_per_round=10), r"num_malicious is 2\n.*4 num_malicious"),
        (lambda: strategies.krum(num_malicious=-1), "num_malicious is -1"),
        (lambda: strategies.krum(num_to_keep=0), "num_to_keep is 0"),
        (lambda: strategies.krum(num_malicious=1, num_to_keep=3, clients_per_round=5), "num_to_keep is 3\n.*= 2 of 5"),
        (lambda: strategies.krum(clients_per_round=2), r"n = 2 updates\n.*fedmedian"),
        (lambda: strategies.fedtrimmedavg(trim=0.5), r"trim is 0.5\n.*\[0, 0.5\)"),
        (lambda: strategies.fedtrimmedavg(trim=-0.1), "trim is -0.1"),
    ],
)
def test_what_a_rule_cannot_withstand_is_refused_by_name(build, message):
    with pytest.raises(SettingError, match=message):
        build()


def test_a_round_with_too_few_updates_is_refused_when_it_happens():
    with pytest.raises(SettingError, match=r"strategy.num_malicious is 2\n.*n = 6 updates\n.*num_malicious=1"):
        aggregate(strategies.krum(num_malicious=2), np.eye(6, dtype=np.float32))


def test_a_share_is_trimmed_in_whole_clients_however_it_is_rounded():
    updates_KD = np.concatenate([np.full((29, 1), FAR), np.zeros((71, 1))]).astype(np.float32)
    assert int(0.29 * 100) == 28
    assert aggregate(strategies.fedtrimmedavg(trim=0.29), updates_KD) == 0
