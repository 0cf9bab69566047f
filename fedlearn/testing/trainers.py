"""Check a trainer, and check two trainers of the same model.

Shapes: K clients in a block, D parameters, N examples, C outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule, plain_training
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array, ClientWork, Examples, LocalSettings, Request
from fedlearn.loop.protocols import Trainer
from fedlearn.privacy.example_sensitivity import sample_examples, untrained_leaves
from fedlearn.testing.comparison import is_close
from fedlearn.testing.example_privacy import BATCH_SIZE, check_example_privacy
from fedlearn.trainers.base import FROM_SEED


def check_trainer(trainer: Trainer, clients: Sequence[Examples], *, tolerance: float = 1e-5) -> None:
    """Check the guarantees of a trainer on which engines rely.

    If a trainer states ``supports_dp_sgd``, no loss or layer may mix the examples of a batch. No example may contribute
    more than the clip norm. See `fedlearn.testing.example_privacy`. The check warns about parameters that never get a
    gradient.

    Args:
        trainer: the trainer.
        clients: examples of at least two clients, preferably of different sizes.
        tolerance: largest difference of an update alone and in a block, >= 0; 0 requires equal bits.

    Raises:
        AssertionError: a guarantee does not hold; the message names it.
    """
    size, params_D = trainer.layout.num_parameters, trainer.init(1)
    assert params_D.shape == (size,), f"init must give shape ({size},), not {params_D.shape}"
    assert params_D.dtype == np.float32, f"init must give float32, not {params_D.dtype}"
    assert np.array_equal(params_D, trainer.init(1)), "init must be a function of the seed"
    copy_D = params_D.copy()
    work = [ClientWork(client=3 * k, examples=examples) for k, examples in enumerate(clients)]
    local = LocalSettings(epochs=2, batch_size=7, learning_rate=0.05)
    request = Request(round=2, seed=1, params_D=params_D, local=local)
    updates = trainer.fit(request, plain_training, work)
    delta_KD = np.asarray(updates.delta_KD)
    assert np.array_equal(params_D, copy_D), "fit must not change the global model"
    assert delta_KD.shape == (len(work), size), f"fit must give shape ({len(work)}, {size}), not {delta_KD.shape}"
    assert updates.clients_K.tolist() == [item.client for item in work], "fit must keep the order of its work"
    assert updates.num_examples_K.tolist() == [len(item.examples) for item in work], (
        "fit must count the examples of each client"
    )
    assert updates.metrics["loss"].count_K.tolist() == [2 * len(item.examples) for item in work], (
        "2 epochs use each example twice"
    )
    assert np.array_equal(delta_KD, np.asarray(trainer.fit(request, plain_training, work).delta_KD)), (
        "fit must be reproducible"
    )
    alone_KD = [np.asarray(trainer.fit(request, plain_training, [item]).delta_KD)[0] for item in work]
    assert is_close(delta_KD, np.stack(alone_KD), tolerance), "a client's update must not depend on its block"
    aged = [item._replace(round=k) for k, item in enumerate(work)]
    apart = [trainer.fit(replace(request, round=k), plain_training, [item]).delta_KD[0] for k, item in enumerate(work)]
    same = is_close(
        trainer.fit(request, plain_training, aged).delta_KD, np.stack([np.asarray(item) for item in apart]), tolerance
    )
    assert same, "a client's random numbers must follow from the round of its ClientWork"
    _check_settings(trainer, request, work, delta_KD)
    _check_gradients(trainer, clients)
    if trainer.supports_dp_sgd:
        check_example_privacy(trainer, clients)
    _check_predict(trainer, params_D, delta_KD, clients)


def _check_gradients(trainer: Trainer, clients: Sequence[Examples]) -> None:
    """Check that training moves some parameters, and warn about parameters that never move."""
    untrained = untrained_leaves(trainer, sample_examples(clients, BATCH_SIZE, seed=1), private=False)
    assert len(untrained) < len(trainer.layout.trainable.leaves), "fit must train: no parameter has a gradient"
    if untrained:
        warnings.warn(f"these parameters have no gradient, so they never train: {', '.join(untrained)}", stacklevel=3)


def _check_settings(trainer: Trainer, request: Request, work: Sequence[ClientWork], delta_KD: np.ndarray) -> None:
    """Check that local settings and local rule apply to each step."""
    still = replace(request, local=replace(request.local, learning_rate=0.0))
    assert not np.asarray(trainer.fit(still, plain_training, work).delta_KD).any(), (
        "learning_rate=0 must not change the model"
    )
    frozen = LocalRule(correct=lambda grad, w, w_global: 0 * grad)
    assert not np.asarray(trainer.fit(request, frozen, work).delta_KD).any(), "the local rule must reach every step"
    doubled = trainer.fit(request, LocalRule(correct=lambda grad, w, w_global: 2 * grad), work).delta_KD
    faster = replace(request, local=replace(request.local, learning_rate=2 * request.local.learning_rate))
    same = is_close(doubled, trainer.fit(faster, plain_training, work).delta_KD, 1e-5)
    assert same, "twice the gradient must equal twice the learning rate"
    later = replace(request, round=request.round + 1)
    moved = not np.array_equal(delta_KD, np.asarray(trainer.fit(later, plain_training, work).delta_KD))
    assert moved, "another round must draw other batches"


def _check_predict(trainer: Trainer, params_D: Array, delta_KD: np.ndarray, clients: Sequence[Examples]) -> None:
    x = clients[0].x
    outputs = trainer.predict(params_D, x)
    assert outputs.ndim == 2, f"predict must give (N, C), not shape {outputs.shape}"
    assert len(outputs) == len(x), f"predict must give one row per example: {len(outputs)} for {len(x)}"
    assert is_close(outputs[:1], trainer.predict(params_D, x[:1]), 1e-5), "an output must not depend on the batch"
    assert not np.array_equal(outputs, trainer.predict(params_D + delta_KD[0], x)), "outputs must follow the parameters"


def check_twins(first: Trainer, second: Trainer, clients: Sequence[Examples], *, tolerance: float = 1e-5) -> None:
    """Check that two trainers have the same model in two frameworks.

    Twins have equal layouts. With the same ``params_D``, their outputs and updates differ by at most ``tolerance``. If
    both draw initial weights from the seed, the weights are equal. Switch dropout off for the comparison.

    Raises:
        AssertionError: the trainers differ; the message names the difference.
    """
    assert first.layout == second.layout, _first_difference(first.layout, second.layout)
    params_D = first.init(1)
    if first.initialization == second.initialization == FROM_SEED:
        assert np.array_equal(params_D, second.init(1)), "twins must start from the same parameters"
    x = clients[0].x
    outputs = first.predict(params_D, x), second.predict(params_D, x)
    assert is_close(*outputs, tolerance), f"twins' outputs differ by {np.abs(outputs[0] - outputs[1]).max():.2e}"
    request = Request(round=1, seed=1, params_D=params_D, local=LocalSettings(batch_size=7, learning_rate=0.05))
    work = [ClientWork(client=k, examples=examples) for k, examples in enumerate(clients)]
    a_KD, b_KD = (np.asarray(trainer.fit(request, plain_training, work).delta_KD) for trainer in (first, second))
    assert is_close(a_KD, b_KD, tolerance), f"twins' updates differ by {np.abs(a_KD - b_KD).max():.2e}"


def _first_difference(first: Layout, second: Layout) -> str:
    pairs = [pair for pair in zip(first.leaves, second.leaves, strict=False) if pair[0] != pair[1]]
    if pairs:
        return f"twins' layouts differ: {pairs[0][0].name}{pairs[0][0].shape} and {pairs[0][1].name}{pairs[0][1].shape}"
    return f"twins' layouts differ: {len(first.leaves)} and {len(second.leaves)} leaves"
