"""Check a strategy against the guarantees that engines, checkpoints and privacy mechanisms rely on.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedlearn.algorithm.aggregation import aggregate_updates
from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context
from fedlearn.core import checkpoint
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.records import MetricSum, ServerState, Updates
from fedlearn.engines.base import serial, vector
from fedlearn.loop.protocols import Engine, Trainer
from fedlearn.loop.training_loop import Schedule, federate, start
from fedlearn.testing.comparison import installed_array_libraries, is_close
from fedlearn.testing.problems import LOCAL_SETTINGS, LinearTrainer, linear_problem

HALF = np.arange(7) < 3


def check_strategy(strategy: Strategy, *, data: FederatedData | None = None, trainer: Trainer | None = None) -> None:
    """Hold a strategy to what the engines, checkpoints and privacy stages rely on.

    It runs a few rounds on a small problem (yours, or a linear one in NumPy, which needs no framework) and checks that
    the run is finite and reproducible, that it does not depend on the engine's blocks, that it can be stopped and
    resumed with bit-identical results, that nothing it was given is changed in place, that its aggregator does not
    depend on the order of clients and moves by no more than its declared sensitivity, and that its local rule means
    the same for NumPy, torch and JAX (those that are installed).

    Raises:
        AssertionError: naming the promise that does not hold.
    """
    data, trainer = data or linear_problem(), trainer or LinearTrainer(3)
    whole = _run(strategy, serial(data, trainer), trainer, rounds=4)
    again = _run(strategy, serial(data, trainer), trainer, rounds=4)
    in_blocks = _run(strategy, vector(data, trainer, block_size=4), trainer, rounds=4)
    assert np.isfinite(whole.params_D).all(), "the model must stay finite"
    assert np.array_equal(whole.params_D, again.params_D), "equal seeds must give equal models"
    tolerance = 0 if trainer.framework != "jax" else 1e-5
    assert is_close(whole.params_D, in_blocks.params_D, tolerance), "the result must not depend on the engine's blocks"
    resumed = _run_with_a_stop(strategy, data, trainer)
    assert np.array_equal(whole.params_D, resumed.params_D), "a resumed run must end as an uninterrupted one"
    _check_aggregator(strategy)
    _check_local_rule(strategy.local)


def _run(
    strategy: Strategy, engine: Engine, trainer: Trainer, *, rounds: int, state: ServerState | None = None
) -> ServerState:
    state = state or start(strategy, trainer.init(1), engine, seed=1)
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=LOCAL_SETTINGS):
        before = np.array(state.params_D)
        assert done.number == state.round + 1, "rounds must follow each other"
        assert np.array_equal(before, np.asarray(state.params_D)), "a round must not change the state before it"
        state = done.state
    return state


def _run_with_a_stop(strategy: Strategy, data: FederatedData, trainer: Trainer) -> ServerState:
    """Two rounds, a checkpoint, and two more from the checkpoint with a new engine."""
    with TemporaryDirectory() as folder:
        first = serial(data, trainer)
        half = _run(strategy, first, trainer, rounds=2)
        path = checkpoint.save(Path(folder), half, first.client_states, layout=trainer.layout)
        second = serial(data, trainer)
        state, second.client_states = checkpoint.load(path, trainer.layout)
        return _run(strategy, second, trainer, rounds=4, state=state)


def _check_aggregator(strategy: Strategy) -> None:
    rng = np.random.default_rng(0)
    layout = Layout.from_shapes([("w", (8,))])
    updates = _some_updates(rng, num_clients=7, size=8)
    names = ("loss", *(f"loss/{name}" for name in strategy.local.evaluate_models))
    told = {name: MetricSum(rng.uniform(1, 9, 7), np.full(7, 3)) for name in names}
    updates = replace(updates, metrics=told)
    result_D = _aggregate(strategy, layout, updates)
    assert result_D.shape == (8,), f"an aggregate of 8 parameters must have shape (8,), not {result_D.shape}"
    shuffled_D = _aggregate(strategy, layout, updates.rows(rng.permutation(7)))
    assert is_close(result_D, shuffled_D, 1e-5), "an aggregate must not depend on the order of clients"
    zeros = replace(updates, delta_KD=np.zeros_like(updates.delta_KD))
    assert is_close(_aggregate(strategy, layout, zeros), 0, 1e-7), "an aggregate of zero updates must be zero"
    for as_library in installed_array_libraries():
        other = replace(updates, delta_KD=as_library(updates.delta_KD))
        same = is_close(_aggregate(strategy, layout, other), result_D, 1e-5)
        assert same, f"an aggregate must be the same on {as_library.__module__} arrays"
    if strategy.aggregate.merge is not None:
        folds = [strategy.aggregate.add(strategy.aggregate.init(layout), updates.rows(r)) for r in (HALF, ~HALF)]
        merged, context = strategy.aggregate.merge(*folds), _context_of(layout, updates)
        merged_D = np.asarray(strategy.aggregate.finish(merged, strategy.aggregate.init_state(layout), context)[0])
        assert is_close(merged_D, result_D, 1e-5), "two merged folds must give what one gives"
    if strategy.aggregate.sensitivity is not None:
        _check_sensitivity(strategy, layout, updates, clip=1.0)


def _check_sensitivity(strategy: Strategy, layout: Layout, updates: Updates, *, clip: float) -> None:
    """Replace one clipped update by its opposite: the worst that one client can do."""
    assert strategy.aggregate.sensitivity is not None
    norms_K1 = np.linalg.norm(updates.delta_KD, axis=1, keepdims=True)
    clipped_KD = (clip * updates.delta_KD / norms_K1).astype(np.float32)
    bound = strategy.aggregate.sensitivity(clip, len(updates))
    for k in range(len(updates)):
        other_KD = clipped_KD.copy()
        other_KD[k] *= -1
        a_D, b_D = (_aggregate(strategy, layout, replace(updates, delta_KD=v)) for v in (clipped_KD, other_KD))
        moved = float(np.linalg.norm(a_D - b_D))
        assert moved <= bound * (1 + 1e-5), f"one client moved the aggregate by {moved:.4g}, declared is {bound:.4g}"


def _check_local_rule(rule: LocalRule) -> None:
    rng = np.random.default_rng(0)
    grad, w, w_global, *vectors = rng.normal(size=(3 + len(rule.client_state) + len(rule.receives), 5)).astype(
        np.float32
    )
    named = dict(zip((*rule.client_state, *rule.receives), vectors, strict=True))
    expected = rule.correct(grad, w, w_global, **named)
    assert np.shape(expected) == (5,), "a local rule must keep the gradient's shape"
    for as_library in installed_array_libraries():
        theirs = {name: as_library(v) for name, v in named.items()}
        corrected = rule.correct(as_library(grad), as_library(w), as_library(w_global), **theirs)
        assert is_close(corrected, expected, 1e-5), f"a local rule must be the same on {as_library.__module__} arrays"
    if rule.feature_penalty:
        _check_contrast(rule.feature_penalty, rng)


def _check_contrast(contrast: Callable[..., Any], rng: np.random.Generator) -> None:
    features = rng.normal(size=(3, 4, 5)).astype(np.float32)
    expected = contrast(*features)
    assert np.shape(expected) == (4,), f"a contrast must be one number an example, not of shape {np.shape(expected)}"
    for as_library in installed_array_libraries():
        same = is_close(contrast(*map(as_library, features)), expected, 1e-5)
        assert same, f"a contrast must be the same on {as_library.__module__} arrays"


def _some_updates(rng: np.random.Generator, *, num_clients: int, size: int) -> Updates:
    return Updates(
        clients_K=np.arange(num_clients),
        delta_KD=rng.normal(size=(num_clients, size)).astype(np.float32),
        num_examples_K=rng.integers(1, 50, num_clients),
        num_steps_K=rng.integers(1, 9, num_clients),
    )


def _aggregate(strategy: Strategy, layout: Layout, updates: Updates) -> np.ndarray:
    """In two blocks, as an engine would hand them over."""
    half = len(updates) // 2
    blocks = [updates.rows(rows) for rows in (np.arange(half), np.arange(half, len(updates)))]
    return np.asarray(aggregate_updates(strategy.aggregate, *blocks, context=_context_of(layout, updates))[0])


def _context_of(layout: Layout, updates: Updates) -> Context:
    return Context(
        round=1,
        seed=0,
        clients_K=updates.clients_K,
        num_examples_K=updates.num_examples_K,
        num_clients=len(updates),
        cohort_size=len(updates),
        params_D=np.zeros(layout.num_parameters, np.float32),
        layout=layout,
    )
