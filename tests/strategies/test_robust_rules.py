"""Rules with a state, mixing or trust have the properties of their papers, and equal an independent implementation."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies
from fedlearn import Context, FedlearnError, SettingError
from fedlearn.algorithm import aggregate_updates
from fedlearn.core.records import Updates
from fedlearn.robust import (
    bucket_weights,
    nearest_neighbor_weights,
    random_permutation,
    rank_by_krum,
    squared_distances,
)

FAR = 1e9
RULES = ("rfa", "centered_clipping", "norm_bounding", "fltrust", "nnm", "bucketing")


def updates_from(rows_KD, *, first=0):
    ones = np.ones(len(rows_KD), np.int64)
    return Updates(
        clients_K=np.arange(first, first + len(rows_KD)), delta_KD=rows_KD, num_examples_K=ones, num_steps_K=ones
    )


def aggregate(strategy, *blocks, memory=None, round=1, seed=1):
    """Return the aggregate of a round, and the state of the rule."""
    context = Context(round=round, seed=seed)
    update_D, memory = aggregate_updates(strategy.aggregate, *blocks, state=memory, context=context)
    return np.asarray(update_D), memory


def of(strategy, rows_KD, **more):
    return aggregate(strategy, updates_from(np.asarray(rows_KD, np.float32)), **more)[0]


@pytest.mark.parametrize("seed", range(5))
def test_rules_equal_an_independent_implementation_on_random_inputs(byzfl, seed):
    rng = np.random.default_rng(seed)
    rows_KD = rng.normal(rng.normal(), 1 + rng.random(), (13, 40)) * rng.choice([1, 30], (13, 1))
    f = int(rng.integers(1, 4))
    pairs = {
        "median": (strategies.fedmedian(), byzfl.rules.Median()),
        "trimmed mean": (strategies.fedtrimmedavg(trim=f / 13), byzfl.rules.TrMean(f)),
        "Krum": (strategies.krum(num_malicious=f), byzfl.rules.Krum(f + 1)),  # it counts the neighbors differently
        "RFA": (strategies.rfa(num_iterations=8, smoothing=0.01), byzfl.rules.GeometricMedian(0.01, 8)),
        "clipping": (
            strategies.centered_clipping(radius=3.0, num_iterations=4),
            byzfl.rules.CenteredClipping(None, 4, 3.0),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        scale = np.abs(rows_KD).max()
        assert np.allclose(of(ours, rows_KD) / scale, theirs(rows_KD) / scale, rtol=0, atol=1e-5), name
    # one update more than our multi-Krum keeps
    best_KD = rows_KD[rank_by_krum(squared_distances(rows_KD), f)[: 12 - f]]
    assert np.allclose(best_KD.mean(0), byzfl.rules.MultiKrum(f + 1)(rows_KD), rtol=0, atol=1e-5)
    mixed = strategies.nnm(rule=strategies.fedtrimmedavg(trim=f / 13), num_malicious=f)
    theirs_D = byzfl.rules.TrMean(f)(byzfl.mixing.NNM(f)(rows_KD))
    assert np.allclose(of(mixed, rows_KD), theirs_D, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_does_not_depend_on_the_order_or_the_blocks_of_clients(name):
    rng = np.random.default_rng(0)
    updates = updates_from(rng.normal(1, 0.3, (9, 6)).astype(np.float32))
    strategy = getattr(strategies, name)()
    whole_D, _ = aggregate(strategy, updates)
    rows = rng.permutation(9)
    parts_D, _ = aggregate(strategy, updates.rows(rows[:4]), updates.rows(rows[4:]))
    assert np.allclose(whole_D, parts_D, atol=1e-5)


@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_the_same_on_every_array_library(name, library):
    xp = pytest.importorskip(library)
    rows_KD = np.random.default_rng(2).normal(1, 0.5, (9, 6)).astype(np.float32)
    strategy = getattr(strategies, name)()
    other_D, _ = aggregate(strategy, updates_from(xp.asarray(rows_KD)))
    assert np.allclose(of(strategy, rows_KD), other_D, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_equal_updates_are_kept_and_no_number_of_far_ones_below_half_takes_the_model_along(name):
    settings = {"norm_bounding": {"bound": 10.0}, "centered_clipping": {"radius": 10.0}}.get(name, {})
    strategy = getattr(strategies, name)(**settings)
    rows_KD = np.full((13, 4), 3.0, np.float32)
    assert np.allclose(of(strategy, rows_KD), 3.0, atol=1e-4)
    rows_KD[3] = FAR
    assert np.abs(of(strategy, rows_KD) - 3.0).max() < 3.0
    rows_KD[7] = -1e30
    assert np.abs(of(strategy, rows_KD)).max() < 10.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0, 30))
def test_a_client_moves_a_clipped_aggregate_by_no_more_than_its_share(seed, scale):
    rng = np.random.default_rng(seed)
    rows_KD = rng.normal(0, 1, (8, 5))
    other_KD = rows_KD.copy()
    other_KD[2] = 10.0**scale * rng.normal(size=5)
    for strategy in (strategies.norm_bounding(bound=0.7), strategies.centered_clipping(radius=0.7)):
        moved = np.linalg.norm(of(strategy, rows_KD) - of(strategy, other_KD))
        assert moved <= 2 * 0.7 / 8 + 1e-5


def test_centered_clipping_goes_on_from_where_the_last_round_ended():
    strategy = strategies.centered_clipping(radius=1.0)
    updates = updates_from(np.full((4, 3), 2.0, np.float32))
    reached, memory = [], None
    for number in range(1, 6):
        update_D, memory = aggregate(strategy, updates, memory=memory, round=number)
        reached.append(float(np.linalg.norm(update_D)))
    assert np.allclose(reached, [1, 2, 3, np.sqrt(12), np.sqrt(12)], atol=1e-5)


def test_the_geometric_median_has_no_shorter_sum_of_distances_about_it():
    rows_KD = np.random.default_rng(3).normal(size=(9, 4)).astype(np.float32)
    median_D = of(strategies.rfa(num_iterations=200), rows_KD)
    sum_of = lambda v_D: np.linalg.norm(rows_KD - v_D, axis=1).sum()  # noqa: E731
    for direction_D in np.random.default_rng(4).normal(size=(50, 4)):
        assert sum_of(median_D) <= sum_of(median_D + 1e-2 * direction_D)


def test_mixing_with_neighbours_leaves_less_variance_and_the_mean_of_honest_clients_nearly_where_it_was():
    rng = np.random.default_rng(5)
    rows_KD = rng.normal(size=(20, 30))
    rows_KD[:4] = 1e6
    nearest = strategies.nnm(rule=strategies.fedavg(), num_malicious=4)
    mixed_KD = nearest_neighbor_weights(squared_distances(rows_KD.astype(np.float32)), 16) @ rows_KD
    assert mixed_KD[4:].var(axis=0).sum() < 0.2 * rows_KD[4:].var(axis=0).sum()
    assert np.linalg.norm(mixed_KD[4:].mean(0) - rows_KD[4:].mean(0)) < 0.5
    assert np.abs(of(nearest, rows_KD[4:])).max() < 1.5


def test_buckets_are_drawn_anew_each_round_and_a_bucket_of_one_is_no_bucketing():
    rows_KD = np.random.default_rng(6).normal(size=(9, 4))
    drawn = [of(strategies.bucketing(rule=strategies.fedmedian(), size=3), rows_KD, round=n) for n in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])
    alone_D = of(strategies.bucketing(rule=strategies.fedmedian(), size=1), rows_KD)
    assert np.allclose(alone_D, of(strategies.fedmedian(), rows_KD))


def test_buckets_leave_a_share_of_the_variance():
    rows_KD, context = np.random.default_rng(8).normal(size=(60, 200)), Context(round=1, seed=1)
    means_MD = bucket_weights(random_permutation(np.arange(60), context), 3) @ rows_KD
    assert means_MD.shape == (20, 200)
    assert means_MD.var(axis=0, ddof=1).mean() == pytest.approx(rows_KD.var(axis=0, ddof=1).mean() / 3, rel=0.1)
    assert np.allclose(means_MD.mean(axis=0), rows_KD.mean(axis=0))


def test_mixing_goes_before_any_rule_one_that_remembers_included():
    rows_KD = np.random.default_rng(7).normal(3, 0.1, (8, 4))
    clipped = strategies.centered_clipping(radius=0.5)
    update_D, memory = aggregate(strategies.bucketing(rule=clipped, size=2), updates_from(rows_KD.astype(np.float32)))
    assert np.linalg.norm(update_D) == pytest.approx(0.5, rel=1e-3)
    assert np.allclose(memory["v"], update_D)


def test_trust_goes_to_those_who_point_where_the_server_does():
    good_D, bad_D = np.array([1.0, 1, 0, 0]), np.array([-1.0, 0, 5, 0])
    rows_KD = [good_D, 100 * good_D, 0.01 * good_D, 1e20 * bad_D]
    assert np.allclose(of(strategies.fltrust(), rows_KD), good_D, atol=1e-5)
    assert not of(strategies.fltrust(), [good_D, -good_D, bad_D]).any()
    assert not of(strategies.fltrust(root_client=1), [bad_D, good_D, -good_D]).any()


def test_without_the_servers_own_update_there_is_no_trust_to_go_by():
    rows = updates_from(np.ones((3, 2), np.float32), first=1)
    with pytest.raises(FedlearnError, match="client 0"):
        aggregate(strategies.fltrust(), rows)


def test_the_servers_own_client_takes_part_in_every_round():
    chosen = [
        strategies.fltrust(root_client=7, clients_per_round=3).select.choose(r, range(50), np.random.default_rng(r))
        for r in range(20)
    ]
    assert all(7 in cohort and len(cohort) in (3, 4) for cohort in chosen)


@pytest.mark.parametrize("rule", ["ifca", "qfedavg", "fltrust"])
def test_what_needs_more_than_updates_is_refused_behind_mixing(rule):
    for mixing in (strategies.nnm, strategies.bucketing):
        with pytest.raises(SettingError, match=r"strategy\.rule is one that needs more"):
            mixing(rule=getattr(strategies, rule)())


def test_a_strategy_of_flower_s_is_refused_behind_mixing():
    flower = pytest.importorskip("flwr.serverapp.strategy")
    from fedlearn.flower.from_flower import from_flower

    with pytest.raises(SettingError, match=r"strategy\.rule is one that needs more"):
        strategies.nnm(rule=from_flower(flower.FedMedian()))


def test_the_benchmark_times_every_rule(capsys):
    from simulations.benchmarks.rules import RULES as TIMED
    from simulations.benchmarks.rules import main

    assert main(["--updates", "12", "--parameters", "50", "--repeat", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(TIMED)


@pytest.mark.parametrize("name", [*RULES, "fedmedian", "fedtrimmedavg", "krum", "bulyan"])
def test_no_rule_needs_more_than_three_copies_of_the_matrix(name, monkeypatch):
    from fedlearn.algorithm import aggregation as folding
    from fedlearn.robust import robust_aggregation

    monkeypatch.setattr(
        robust_aggregation, "MAX_ELEMENTS", 2**14
    )  # scaled down with the matrix, so that the ratio is that of a large matrix
    monkeypatch.setattr(folding, "TILE_SIZE", 2**10)
    strategy = getattr(strategies, name)()
    tracemalloc.start()
    updates = [updates_from(np.ones((15, 20_000), np.float32), first=first) for first in (0, 15)]
    matrix = tracemalloc.get_traced_memory()[0]
    aggregate(strategy, *updates)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 3.1 * matrix, f"{peak / matrix:.2f}"  # one tenth for memory that does not grow with the matrix
