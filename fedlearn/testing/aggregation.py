"""Check the aggregator of a strategy on random updates, without training.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedlearn.algorithm.aggregation import Aggregator, aggregate_updates
from fedlearn.algorithm.strategy import Strategy, extra_names
from fedlearn.algorithm.transforms import Context
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.records import MetricSum, State, Updates
from fedlearn.testing.comparison import installed_array_libraries, is_close

LAYOUT = Layout.from_shapes([("w", (8,))])
NUM_CLIENTS, TOLERANCE = 12, 1e-5


def check_aggregation(strategy: Strategy) -> None:
    """Check that an aggregator is pure, independent of the order of clients, and bounded as declared.

    Raises:
        AssertionError: a guarantee does not hold; the message names it.
    """
    aggregator, updates = strategy.aggregate, some_updates(strategy)
    first_D, state = aggregate(aggregator, updates)
    assert first_D.shape == (8,), f"an aggregate of 8 parameters must have shape (8,), not {first_D.shape}"
    _check_arguments_are_kept(aggregator, updates, state)
    _check_state(state)
    expected = two_rounds(aggregator, updates, updates)
    is_pure = np.array_equal(expected, two_rounds(aggregator, updates, updates))
    assert is_pure, (
        "an aggregation rule must depend on its arguments only: no state in a closure, no other random numbers"
    )
    _check_clients(strategy, updates, expected)
    zeros = replace(updates, delta_KD=np.zeros_like(updates.delta_KD))
    assert is_close(aggregate(aggregator, zeros)[0], 0, 1e-7), "an aggregate of zero updates must be zero"
    for as_library in installed_array_libraries():
        other = replace(
            updates,
            delta_KD=as_library(updates.delta_KD),
            extra={name: as_library(rows_KD) for name, rows_KD in updates.extra.items()},
        )
        same = is_close(two_rounds(aggregator, other, other), expected, TOLERANCE)
        assert same, f"an aggregate must be the same on {as_library.__module__} arrays"
    if aggregator.merge is not None:
        halves = [aggregator.add(aggregator.init(LAYOUT), block) for block in _halves(updates)]
        merged = aggregator.merge(*halves)
        merged_D, _ = aggregator.finish(merged, aggregator.init_state(LAYOUT), _context(updates, 1))
        assert is_close(merged_D, first_D, TOLERANCE), "two merged partial states must give the aggregate of the whole"
    if aggregator.sensitivity is not None:
        check_sensitivity(aggregator)


def some_updates(strategy: Strategy, *, num_clients: int = NUM_CLIENTS, seed: int = 0) -> Updates:
    """Return updates with all values that a rule may read. Client ids differ from row numbers."""
    rng, root = np.random.default_rng(seed), strategy.root.client if strategy.root else 2
    clients_K = np.sort([root, *(root + 3 * k for k in range(1, num_clients))])
    names = ("loss", *(f"loss/{name}" for name in strategy.local.evaluate_models))
    count_K = np.full(num_clients, 3)
    return Updates(
        clients_K=clients_K,
        delta_KD=rng.normal(size=(num_clients, 8)).astype(np.float32),
        num_examples_K=rng.integers(1, 50, num_clients),
        num_steps_K=rng.integers(1, 9, num_clients),
        metrics={name: MetricSum(rng.uniform(1, 9, num_clients), count_K) for name in names},
        extra={n: rng.normal(size=(num_clients, 8)).astype(np.float32) for n in extra_names(strategy.local)},
    )


def aggregate(
    aggregator: Aggregator, updates: Updates, *, state: State | None = None, round: int = 1
) -> tuple[np.ndarray, State]:
    """Aggregate a round in two blocks, and return the aggregate and the new state.

    Raises:
        AssertionError: the rule reads values that it does not declare, or uses client ids as row numbers.
    """
    state = aggregator.init_state(LAYOUT) if state is None else state
    try:
        update_D, after = aggregate_updates(
            aggregator, *_halves(updates), state=state, context=_context(updates, round)
        )
    except KeyError as error:
        missing = [name for name in ("metrics", "extra") if error.args[0] in getattr(updates, name)]
        if not missing:
            raise
        raise AssertionError(f"a rule that reads {error} must declare reads=({missing[0]!r},)") from error
    except IndexError as error:
        raise AssertionError("an aggregation rule must not use client ids as row numbers") from error
    return np.asarray(as_numpy(update_D)), after


def two_rounds(aggregator: Aggregator, first: Updates, second: Updates) -> np.ndarray:
    """Return the aggregates of two consecutive rounds, ``(2, D)``."""
    first_D, state = aggregate(aggregator, first)
    return np.stack([first_D, aggregate(aggregator, second, state=state, round=2)[0]])


def _check_clients(strategy: Strategy, updates: Updates, expected: np.ndarray) -> None:
    """Check the influence of client ids and of the order of clients."""
    aggregator, rng = strategy.aggregate, np.random.default_rng(1)
    shuffled = [updates.rows(rng.permutation(len(updates))) for _ in range(2)]
    same = is_close(two_rounds(aggregator, *shuffled), expected, TOLERANCE)
    assert same, "an aggregate must not depend on the order of clients"
    renamed = replace(updates, clients_K=_rename(updates.clients_K))
    two_rounds(aggregator, renamed, renamed)  # fails if ids are row numbers of a table
    if "clients_K" not in aggregator.reads:
        same = is_close(two_rounds(aggregator, updates, renamed), expected, TOLERANCE)
        assert same, "a rule that uses client ids must declare reads=('clients_K',)"


def _rename(clients_K: np.ndarray) -> np.ndarray:
    """Return other, large ids in the same order. The first id does not change, because it may be the root client."""
    return np.where(np.arange(len(clients_K)) > 0, 7 * clients_K + 1_000_000, clients_K)


def _check_arguments_are_kept(aggregator: Aggregator, updates: Updates, state: State) -> None:
    before = _copies(updates, state)
    aggregate_updates(aggregator, updates, state=state, context=_context(updates, 2))  # one block, so no copy
    for name, value in _copies(updates, state).items():
        assert np.array_equal(value, before[name]), (
            f"an aggregation rule must not change its arguments in place: {name}"
        )


def _copies(updates: Updates, state: State) -> Mapping[str, np.ndarray]:
    arrays = {"delta_KD": updates.delta_KD, "num_examples_K": updates.num_examples_K, "clients_K": updates.clients_K}
    sums = {f"metrics {name}": metric.total_K for name, metric in updates.metrics.items()}
    named = {**arrays, **sums, **{f"state {name}": value for name, value in state.items()}}
    return {name: np.array(as_numpy(value)) for name, value in named.items()}


def _check_state(state: State) -> None:
    for name, value in state.items():
        is_numeric = np.asarray(as_numpy(value)).dtype.kind in "biuf"
        assert is_numeric, (
            f"the state of a rule must be named arrays of numbers, because checkpoints contain it: {name}"
        )


def check_sensitivity(aggregator: Aggregator, *, clip: float = 1.0) -> None:
    """Check that no replaced update moves the aggregate by more than the declared sensitivity.

    Updates are random, equal, or in two opposite groups. The replacement is the opposite update, zero, or a random
    update, with a random number of examples.
    """
    assert aggregator.sensitivity is not None
    rng = np.random.default_rng(2)
    for num_clients in (2, 3, NUM_CLIENTS):
        bound = aggregator.sensitivity(clip, num_clients)
        for rows_KD in _clipped_rows(rng, num_clients, clip):
            rows = _updates_of(rows_KD)
            before_D, _ = aggregate(aggregator, rows)
            for other in _with_one_replaced(rng, rows, clip):
                moved = float(np.linalg.norm(aggregate(aggregator, other)[0] - before_D))
                assert moved <= bound * (1 + TOLERANCE), (
                    f"the sensitivity of the aggregator is wrong: one of {num_clients} clients moved the aggregate by "
                    f"{moved:.4g}, but {bound:.4g} is declared"
                )


def _clipped_rows(rng: np.random.Generator, num_clients: int, clip: float) -> Sequence[np.ndarray]:
    random_KD = rng.normal(size=(num_clients, 8))
    sign_K1 = np.where(np.arange(num_clients) % 2, 1.0, -1.0)[:, None]
    rows = (random_KD, np.broadcast_to(random_KD[:1], random_KD.shape), sign_K1 * random_KD[:1])
    return [clip * r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows]


def _with_one_replaced(rng: np.random.Generator, updates: Updates, clip: float) -> Sequence[Updates]:
    others = []
    for k in range(len(updates)):
        random_D = rng.normal(size=8)
        row_D = updates.delta_KD[k]
        for new_D in (-row_D, 0 * row_D, clip * random_D / np.linalg.norm(random_D)):
            delta_KD, counts_K = updates.delta_KD.copy(), updates.num_examples_K.copy()
            delta_KD[k], counts_K[k] = new_D, rng.choice([1, 50, 10_000])
            others.append(replace(updates, delta_KD=delta_KD, num_examples_K=counts_K))
    return others


def _updates_of(rows_KD: np.ndarray) -> Updates:
    num = len(rows_KD)
    counts_K = np.full(num, 50)
    return Updates(
        clients_K=3 * np.arange(num),
        delta_KD=rows_KD.astype(np.float32),
        num_examples_K=counts_K,
        num_steps_K=np.ones(num, np.int64),
    )


def _halves(updates: Updates) -> list[Updates]:
    """Return the updates in two blocks, as an engine yields them."""
    half = len(updates) // 2
    return [updates.rows(rows) for rows in (np.arange(half), np.arange(half, len(updates)))]


def _context(updates: Updates, round: int) -> Context:
    values: dict[str, Any] = {"clients_K": updates.clients_K, "num_examples_K": updates.num_examples_K}
    return Context(
        round=round,
        seed=1,
        num_clients=10 * len(updates),
        cohort_size=len(updates),
        params_D=np.zeros(8, np.float32),
        layout=LAYOUT,
        received_KD=np.zeros((len(updates), 8), np.float32),
        shared_D=np.zeros(8, np.float32),
        **values,
    )
