from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlearn import Context, Layout, SettingError, Updates, mean, stacked
from fedlearn.algorithm import aggregate_updates, aggregation
from fedlearn.core.records import MetricSum
from simulations.benchmarks.mean import measure

LAYOUT = Layout.from_shapes([("w", (5,))])
floats = st.floats(-1e3, 1e3, width=32)
blocks = st.integers(1, 9).flatmap(lambda k: arrays(np.float32, (k, 5), elements=floats))


def updates_of(delta_KD, num_examples_K=None):
    k = len(delta_KD)
    counts = np.arange(1, k + 1) if num_examples_K is None else np.array(num_examples_K)
    return Updates(clients_K=np.arange(k), delta_KD=delta_KD, num_examples_K=counts, num_steps_K=np.ones(k, int))


def accumulated(aggregator, updates, cut=()):
    memory = aggregator.init(LAYOUT)
    for rows in np.split(np.arange(len(updates)), cut):
        if len(rows):
            memory = aggregator.add(memory, updates.rows(rows))
    return memory


def aggregated(aggregator, updates, cut=()):
    return np.asarray(aggregator.finalize(accumulated(aggregator, updates, cut)))


@given(blocks, st.lists(st.integers(0, 9), max_size=3).map(sorted))
def test_a_mean_does_not_depend_on_how_the_cohort_is_cut_into_blocks(delta_KD, cut):
    updates = updates_of(delta_KD)
    assert np.array_equal(aggregated(mean(), updates, cut), aggregated(mean(), updates))


@given(blocks, st.randoms(use_true_random=False))
def test_a_mean_does_not_depend_on_the_order_of_clients(delta_KD, random):
    updates = updates_of(delta_KD)
    order = random.sample(range(len(delta_KD)), len(delta_KD))
    assert np.allclose(aggregated(mean(), updates), aggregated(mean(), updates.rows(np.array(order))), atol=1e-4)


@given(arrays(np.float32, 5, elements=floats), st.integers(1, 20))
def test_a_mean_of_equal_updates_is_that_update_exactly(delta_D, k):
    assert np.array_equal(aggregated(mean(), updates_of(np.tile(delta_D, (k, 1)))), delta_D)


@given(blocks)
def test_a_mean_agrees_with_numpy(delta_KD):
    counts = np.arange(1, len(delta_KD) + 1)
    expected = np.average(delta_KD.astype(np.float64), axis=0, weights=counts)
    assert np.allclose(aggregated(mean(), updates_of(delta_KD)), expected, rtol=1e-6, atol=1e-6)
    equal = aggregated(mean(weighting="equal"), updates_of(delta_KD))
    assert np.allclose(equal, delta_KD.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.framework
def test_a_long_sum_loses_nothing_to_float32_in_any_library():
    rng = np.random.default_rng(0)
    delta_KD = (rng.normal(size=(3000, 5)) * 10.0 ** rng.integers(-4, 4, (3000, 1))).astype(np.float32)
    exact = delta_KD.astype(np.float64).mean(axis=0)
    updates = updates_of(delta_KD)
    for convert in libraries():
        ours = aggregated(mean(weighting="equal"), replace(updates, delta_KD=convert(delta_KD)))
        assert np.abs(ours - exact).max() <= 1e-6 * np.abs(exact).max(), convert


def libraries():
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    return [np.asarray, torch.from_numpy, jnp.asarray]


def test_a_mean_takes_memory_for_one_vector_however_many_clients_there_are():
    memory = mean().init(LAYOUT)
    for _ in range(100):
        memory = mean().add(memory, updates_of(np.ones((3, 5), np.float32)))
    assert memory["total"].shape == (5,)


def test_a_stacked_rule_sees_all_clients_at_once():
    updates = updates_of(np.arange(20, dtype=np.float32).reshape(4, 5))
    rows = (updates.rows(np.arange(1)), updates.rows(np.arange(1, 4)))
    seen = stacked(lambda updates, state, context: (np.median(updates.delta_KD, axis=0), state))
    assert np.array_equal(aggregate_updates(seen, *rows)[0], np.median(updates.delta_KD, axis=0))


def test_a_rule_gets_state_ids_losses_and_extra_vectors_as_declared():
    def rule(updates, state, context):
        rounds = state["rounds"] + 1
        loss_K = updates.metrics["loss"].client_means()
        return updates.extra["control"][np.argmax(loss_K)] + updates.clients_K.max(), {"rounds": rounds}

    reads = ("clients_K", "metrics", "extra")
    aggregate = stacked(rule, init=lambda layout: {"rounds": np.zeros(1)}, reads=reads)
    rows_KD = np.arange(20, dtype=np.float32).reshape(4, 5)
    loss = MetricSum(np.array([1.0, 9.0, 2.0, 3.0]), np.ones(4))
    updates = replace(updates_of(rows_KD), metrics={"loss": loss}, extra={"control": 2 * rows_KD})
    halves = (updates.rows(np.arange(2)), updates.rows(np.arange(2, 4)))
    update_D, state = aggregate_updates(aggregate, *halves)
    assert np.array_equal(update_D, 2 * rows_KD[1] + 3)
    assert aggregate_updates(aggregate, *halves, state=state)[1]["rounds"] == 2


def test_a_rule_does_not_get_what_it_does_not_declare():
    fields = {}

    def rule(updates, state, context):
        fields.update(metrics=dict(updates.metrics), extra=dict(updates.extra), context=dict(context.metrics))
        return updates.delta_KD[0], state

    rows_KD = np.ones((2, 5), np.float32)
    loss = MetricSum(np.ones(2), np.ones(2))
    updates = replace(updates_of(rows_KD), metrics={"loss": loss}, extra={"control": rows_KD})
    context = Context(round=1, seed=1, metrics={"loss": np.ones(2)})
    aggregate_updates(stacked(rule), updates, context=context)
    assert fields == {"metrics": {}, "extra": {}, "context": {}}
    with pytest.raises(SettingError, match=r"reads(.|\n)*metrics"):
        stacked(rule, reads=("losses",))


def test_a_generator_of_a_round_follows_from_the_seed_and_is_secret_in_a_deployment():
    draw = lambda **more: Context(**{"round": 1, "seed": 1, **more}).random_generator().random()  # noqa: E731
    assert draw() == draw()
    assert len({draw(), draw(round=2), draw(seed=2), draw(deployed=True), draw(deployed=True)}) == 5


def test_an_unknown_weighting_is_refused():
    with pytest.raises(SettingError, match="weighting is exampels"):
        mean(weighting="exampels")


def test_a_mean_takes_less_than_four_vectors_whatever_the_number_of_clients():
    few, _ = measure(2, 4_000_000)
    many, _ = measure(12, 4_000_000)
    assert many < few + 0.01
    assert many < 4


@pytest.mark.parametrize("size", [1, 7, 100, 101])
def test_a_mean_in_the_memory_of_its_sum_equals_a_mean_beside_it(monkeypatch, size):
    total_D = np.random.default_rng(size).normal(size=size) * 10.0 ** np.linspace(-20, 20, size)
    expected_D = aggregation.divide_total(total_D.copy(), 3.0)
    monkeypatch.setattr(aggregation, "MIN_SHRUNK_SIZE", 1)
    monkeypatch.setattr(aggregation, "TILE_SIZE", 8)
    view_D = total_D[size // 2 :]
    result_D = aggregation.divide_total(total_D, 3.0)
    assert result_D.dtype == np.float32
    assert np.array_equal(result_D, expected_D)
    assert np.shares_memory(result_D, total_D)
    assert len(view_D) == size - size // 2  # the memory of older views stays valid


@pytest.mark.parametrize("change", [lambda v: v.astype(np.float32), lambda v: v[:], lambda v: v.reshape(2, -1)])
def test_a_sum_in_foreign_memory_keeps_its_values(monkeypatch, change):
    monkeypatch.setattr(aggregation, "MIN_SHRUNK_SIZE", 1)
    total = change(np.arange(8.0))
    before = total.copy()
    assert np.array_equal(aggregation.divide_total(total, 2.0), (before / 2).astype(np.float32))
    assert np.array_equal(total, before)
