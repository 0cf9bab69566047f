"""Check a trainer, and check two trainers of the same model.

Shapes: K clients in a block, D parameters, N examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule, plain_training
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array, ClientWork, Examples, LocalSettings, Request
from fedlearn.loop.protocols import Trainer
from fedlearn.testing.comparison import is_close
from fedlearn.testing.example_privacy import check_example_privacy
from fedlearn.trainers.base import FROM_SEED


def check_trainer(trainer: Trainer, clients: Sequence[Examples], *, tolerance: float = 1e-5) -> None:
    """Check that a trainer keeps the guarantees that engines rely on.

    A trainer that states ``supports_dp_sgd`` must also keep the examples of a batch apart: no loss or layer may mix
    them, and none contributes more than the clip norm. See `fedlearn.testing.example_privacy`.

    Args:
        trainer: the trainer.
        clients: examples of at least two clients, better of uneven size.
        tolerance: largest difference of the update of a client alone and in a block; 0 asks for bit equality.

    Raises:
        AssertionError: names the guarantee that does not hold.
    """
    size, params_D = trainer.layout.num_parameters, trainer.init(1)
    assert params_D.shape == (size,), f"init must give shape ({size},), not {params_D.shape}"
    assert params_D.dtype == np.float32, f"init must give float32, not {params_D.dtype}"
    assert np.array_equal(params_D, trainer.init(1)), "init must be a function of the seed"
    given_D = params_D.copy()
    work = [ClientWork(client=3 * k, examples=examples) for k, examples in enumerate(clients)]
    local = LocalSettings(epochs=2, batch_size=7, learning_rate=0.05)
    order = Request(round=2, seed=1, params_D=params_D, local=local)
    updates = trainer.fit(order, plain_training, work)
    delta_KD = np.asarray(updates.delta_KD)
    assert np.array_equal(params_D, given_D), "fit must not change the global model it was given"
    assert delta_KD.shape == (len(work), size), f"fit must give shape ({len(work)}, {size}), not {delta_KD.shape}"
    assert updates.clients_K.tolist() == [one.client for one in work], "fit must keep the order of its work"
    assert updates.num_examples_K.tolist() == [len(one.examples) for one in work], "fit must count its examples"
    assert updates.metrics["loss"].count_K.tolist() == [2 * len(one.examples) for one in work], "2 epochs see all twice"
    assert np.array_equal(delta_KD, np.asarray(trainer.fit(order, plain_training, work).delta_KD)), (
        "fit must be reproducible"
    )
    alone_KD = [np.asarray(trainer.fit(order, plain_training, [one]).delta_KD)[0] for one in work]
    assert is_close(delta_KD, np.stack(alone_KD), tolerance), "a client's update must not depend on its block"
    aged = [one._replace(round=k) for k, one in enumerate(work)]
    apart = [trainer.fit(replace(order, round=k), plain_training, [one]).delta_KD[0] for k, one in enumerate(work)]
    same = is_close(
        trainer.fit(order, plain_training, aged).delta_KD, np.stack([np.asarray(one) for one in apart]), tolerance
    )
    assert same, "a client's random numbers must follow from the round that its work names"
    _check_obedience(trainer, order, work, delta_KD)
    if trainer.supports_dp_sgd:
        check_example_privacy(trainer, clients)
    _check_predict(trainer, params_D, delta_KD, clients)


def _check_obedience(trainer: Trainer, order: Request, work: Sequence[ClientWork], delta_KD: np.ndarray) -> None:
    """The order's settings and the local rule reach every step."""
    still = replace(order, local=replace(order.local, learning_rate=0.0))
    assert not np.asarray(trainer.fit(still, plain_training, work).delta_KD).any(), (
        "learning_rate=0 must leave the model alone"
    )
    frozen = LocalRule(correct=lambda grad, w, w_global: 0 * grad)
    assert not np.asarray(trainer.fit(order, frozen, work).delta_KD).any(), "the local rule must reach every step"
    doubled = trainer.fit(order, LocalRule(correct=lambda grad, w, w_global: 2 * grad), work).delta_KD
    faster = replace(order, local=replace(order.local, learning_rate=2 * order.local.learning_rate))
    same = is_close(doubled, trainer.fit(faster, plain_training, work).delta_KD, 1e-5)
    assert same, "doubling the gradient must do what doubling the learning rate does"
    later = replace(order, round=order.round + 1)
    moved = not np.array_equal(delta_KD, np.asarray(trainer.fit(later, plain_training, work).delta_KD))
    assert moved, "another round must draw other batches"


def _check_predict(trainer: Trainer, params_D: Array, delta_KD: np.ndarray, clients: Sequence[Examples]) -> None:
    x = clients[0].x
    outputs = trainer.predict(params_D, x)
    assert outputs.ndim == 2, f"predict must give (N, C), not shape {outputs.shape}"
    assert len(outputs) == len(x), f"predict must give one row an example: {len(outputs)} for {len(x)}"
    assert is_close(outputs[:1], trainer.predict(params_D, x[:1]), 1e-5), "an output must not depend on the batch"
    assert not np.array_equal(outputs, trainer.predict(params_D + delta_KD[0], x)), "outputs must follow the parameters"


def check_twins(first: Trainer, second: Trainer, clients: Sequence[Examples], *, tolerance: float = 1e-5) -> None:
    """Hold two trainers to being the same model in two frameworks.

    Twins have equal layouts. On the same ``params_D`` their outputs and updates are equal within ``tolerance`` in any
    number. Weights that both draw from the seed are equal. Compare models with dropout with dropout switched off.

    Raises:
        AssertionError: naming what differs.
    """
    assert first.layout == second.layout, _first_difference(first.layout, second.layout)
    params_D = first.init(1)
    if first.initialization == second.initialization == FROM_SEED:
        assert np.array_equal(params_D, second.init(1)), "twins must start from the same parameters"
    x = clients[0].x
    outputs = first.predict(params_D, x), second.predict(params_D, x)
    assert is_close(*outputs, tolerance), f"twins' outputs differ by {np.abs(outputs[0] - outputs[1]).max():.2e}"
    order = Request(round=1, seed=1, params_D=params_D, local=LocalSettings(batch_size=7, learning_rate=0.05))
    work = [ClientWork(client=k, examples=examples) for k, examples in enumerate(clients)]
    a_KD, b_KD = (np.asarray(trainer.fit(order, plain_training, work).delta_KD) for trainer in (first, second))
    assert is_close(a_KD, b_KD, tolerance), f"twins' updates differ by {np.abs(a_KD - b_KD).max():.2e}"


def _first_difference(one: Layout, other: Layout) -> str:
    pairs = [pair for pair in zip(one.leaves, other.leaves, strict=False) if pair[0] != pair[1]]
    if pairs:
        return f"twins' layouts differ: {pairs[0][0].name}{pairs[0][0].shape} and {pairs[0][1].name}{pairs[0][1].shape}"
    return f"twins' layouts differ: {len(one.leaves)} and {len(other.leaves)} leaves"
