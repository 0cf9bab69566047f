"""Check the guarantees of a strategy on which engines, checkpoints and privacy mechanisms rely.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core import checkpoint
from fedlearn.core.arrays import as_numpy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import ServerState
from fedlearn.engines.base import InProcessEngine, serial, vector
from fedlearn.errors import SettingError
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.schedule import Schedule
from fedlearn.loop.training_loop import federate, start
from fedlearn.testing.aggregation import check_aggregation
from fedlearn.testing.comparison import installed_array_libraries, is_close
from fedlearn.testing.hooks import check_hooks
from fedlearn.testing.networks import HiddenLayerTrainer
from fedlearn.testing.problems import LOCAL_SETTINGS, num_clients_for, problem_for
from fedlearn.testing.selection import check_selection

MAX_PADDING_DIFFERENCE = 1e-5  # largest change of a parameter by padding of batches, after four rounds


def check_strategy(strategy: Strategy, *, data: FederatedData | None = None, trainer: Trainer | None = None) -> None:
    """Check the guarantees of a strategy on which engines and privacy mechanisms rely.

    The check tests the aggregator, the selector and the local rule alone, and then runs a few rounds. The run must be
    finite and reproducible. It must not depend on the block size or on the padding of batches. A resumed run must be
    equal bit for bit. No array may change in place.

    Args:
        strategy: the strategy to check.
        data: data of a problem. Default: a small problem that meets the needs of the strategy.
        trainer: trainer of the problem. Default: a trainer in NumPy that supports the local rule.

    Raises:
        AssertionError: a guarantee does not hold; the message names it. Or the strategy refuses the default problem,
            and needs ``data`` and ``trainer``.
    """
    if data is None or trainer is None:
        some_data, some_trainer = problem_for(strategy)
        try:
            check_strategy(strategy, data=data or some_data, trainer=trainer or some_trainer)
        except SettingError as error:
            raise AssertionError(
                f"the strategy refuses the problem of this check: {error}\n"
                "  advice    check_strategy(strategy, data=..., trainer=...) with a problem that fits it"
            ) from error
        return
    check_aggregation(strategy)
    check_selection(strategy.select, num_clients=num_clients_for(strategy))
    _check_local_rule(strategy.local)
    whole, client_states = _run(strategy, serial(data, trainer), trainer, rounds=4)
    again, _ = _run(strategy, serial(data, trainer), trainer, rounds=4)
    in_blocks, _ = _run(strategy, vector(data, trainer, block_size=4), trainer, rounds=4)
    assert np.isfinite(whole["params"]).all(), "the model must stay finite"
    same = np.array_equal(whole["params"], again["params"])
    assert same, "equal seeds must give equal models: no state outside the server state, no other random numbers"
    tolerance = 0 if trainer.framework != "jax" else 1e-5
    same = is_close(whole["params"], in_blocks["params"], tolerance)
    assert same, "the result must not depend on the engine's blocks"
    _check_padding(strategy, data, trainer, whole["params"])
    resumed, resumed_client_states = _run_with_a_stop(strategy, data, trainer)
    _check_resumed("model", {"params": whole["params"]}, {"params": resumed["params"]})
    _check_resumed("client states", client_states, resumed_client_states)


def _check_padding(strategy: Strategy, data: FederatedData, trainer: Trainer, params_D: np.ndarray) -> None:
    """Check that rows of padding do not change the result of a rule with hooks in local steps."""
    rule = strategy.local
    if rule.penalty is None and rule.gradient is None:
        return
    if isinstance(trainer, HiddenLayerTrainer):
        padded = copy(trainer)
        padded.num_padding = 3
        engine = serial(data, padded)
    else:
        try:
            engine = vector(data, trainer, batching="vmap", block_size=4)
        except SettingError:  # the trainer or its model trains one client after another, without padding
            return
    values, _ = _run(strategy, engine, trainer, rounds=4)
    difference = float(np.abs(values["params"] - params_D).max())
    assert difference <= MAX_PADDING_DIFFERENCE, (
        f"padding of batches changes the result by {difference:.1e}: use the mask of a Batch in the penalty"
    )


def _check_resumed(kind: str, whole: Mapping[str, np.ndarray], resumed: Mapping[str, np.ndarray]) -> None:
    same = whole.keys() == resumed.keys() and all(np.array_equal(whole[n], resumed[n], equal_nan=True) for n in whole)
    assert same, f"a resumed run must equal an uninterrupted run, but the {kind} differ: a state is not saved"


def _run(
    strategy: Strategy, engine: InProcessEngine, trainer: Trainer, *, rounds: int, state: ServerState | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return all arrays of the server and of the clients after some rounds."""
    state = _last_state(strategy, engine, trainer, rounds=rounds, state=state)
    values = {f"{k}/{name}": v for k, client_state in engine.client_states.items() for name, v in client_state.items()}
    return _arrays(state), {name: np.array(as_numpy(value)) for name, value in values.items()}


def _last_state(
    strategy: Strategy, engine: InProcessEngine, trainer: Trainer, *, rounds: int, state: ServerState | None = None
) -> ServerState:
    state = state or start(strategy, trainer.init(1), engine, seed=1)
    before = _arrays(state)
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=LOCAL_SETTINGS):
        assert done.number == state.round + 1, "rounds must follow each other"
        changed = [name for name, value in _arrays(state).items() if not np.array_equal(value, before[name])]
        assert not changed, f"a round must not change the state before it in place: {', '.join(changed)}"
        state, before = done.state, _arrays(done.state)
    return state


def _arrays(state: ServerState) -> dict[str, np.ndarray]:
    """Return copies of all arrays of a server state, by name."""
    named: dict[str, Any] = {"params": state.params_D}
    parts = {"server": state.server, "aggregate": state.aggregate, "select": state.select}
    parts |= {f"stage {i}": stage for i, stage in enumerate(state.stages)}
    named |= {f"{part} {name}": value for part, values in parts.items() for name, value in values.items()}
    return {name: np.array(as_numpy(value)) for name, value in named.items()}


def _run_with_a_stop(
    strategy: Strategy, data: FederatedData, trainer: Trainer
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Run two rounds, save a checkpoint, and run two rounds more from it with a new engine."""
    with TemporaryDirectory() as folder:
        first = serial(data, trainer)
        half = _last_state(strategy, first, trainer, rounds=2)
        path = checkpoint.save(Path(folder), half, first.client_states, layout=trainer.layout)
        second = serial(data, trainer)
        state, second.client_states = checkpoint.load(path, trainer.layout)
        return _run(strategy, second, trainer, rounds=4, state=state)


def _check_local_rule(rule: LocalRule) -> None:
    rng = np.random.default_rng(0)
    names = (*rule.client_state, *rule.receives)
    grad, w, w_global, *vectors = rng.normal(size=(3 + len(names), 5)).astype(np.float32)
    named = dict(zip(names, vectors, strict=True))
    _refuse_changes_in_place("a local rule", rule.correct, grad, w, w_global, **named)
    expected = rule.correct(grad, w, w_global, **named)
    assert np.shape(expected) == (5,), "a local rule must keep the gradient's shape"
    for as_library in installed_array_libraries():
        converted = {name: as_library(v) for name, v in named.items()}
        corrected = rule.correct(as_library(grad), as_library(w), as_library(w_global), **converted)
        assert is_close(corrected, expected, 1e-5), f"a local rule must be the same on {as_library.__module__} arrays"
    _check_after_training(rule, rng)
    check_hooks(rule, rng)


def _check_after_training(rule: LocalRule, rng: np.random.Generator) -> None:
    vectors = {name: rng.normal(size=(4, 5)).astype(np.float32) for name in rule.client_state}
    vectors |= {name: rng.normal(size=5).astype(np.float32) for name in rule.receives}
    delta_KD, steps_K = rng.normal(size=(4, 5)).astype(np.float32), np.full(4, 3, np.float32)
    _refuse_changes_in_place("after_training", rule.after_training, delta_KD, steps_K, 0.1, **vectors)
    state, _ = rule.after_training(delta_KD, steps_K, 0.1, **vectors)
    same = set(state) == set(rule.client_state)
    assert same, f"after_training must return the client states {rule.client_state}, not {tuple(state)}"


def _refuse_changes_in_place(name: str, function: Callable[..., Any], *arguments: Any, **vectors: Any) -> None:
    values = [*arguments, *vectors.values()]
    before = [np.array(value) for value in values]
    function(*arguments, **vectors)
    same = all(np.array_equal(now, then) for now, then in zip(values, before, strict=True))
    assert same, f"{name} must not change its arguments in place"
