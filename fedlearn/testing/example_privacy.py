"""Check that DP-SGD of a trainer bounds the contribution of each example.

Shapes: N examples of a batch, D parameters.

One step on a full batch without noise gives the sum of clipped gradients. A step on one example gives its
contribution. If examples do not mix, the contributions add up to the sum of the batch. With random layers, only the
movement by one example has a bound, which `fedlearn.privacy.example_sensitivity` measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import ClientWork, ExampleDP, Examples, LocalSettings, Request
from fedlearn.errors import SettingError
from fedlearn.loop.protocols import Trainer
from fedlearn.privacy.example_sensitivity import (
    CLIENT,
    measure_sensitivity,
    sample_examples,
    untrained_leaves,
)

BATCH_SIZE = 6
TOLERANCE = 0.02  # relative to the clip norm or the largest gradient: far above rounding, far below mixed gradients


def check_example_privacy(trainer: Trainer, clients: Sequence[Examples]) -> None:
    """Check a trainer that states ``supports_dp_sgd``.

    No example may contribute more than the clip norm. The contributions of a batch must add up, and so must the
    gradients of plain training. For a model with random layers (dropout) or inputs (augmentation), the check replaces
    examples at equal random numbers. One example more in a batch may move the sum by at most the clip norm. DP-SGD must
    train each parameter that plain training trains.

    Raises:
        AssertionError: a guarantee does not hold, or the trainer refuses DP-SGD for this model; the message says why.
    """
    params_D, batch = trainer.init(1), _batch(clients)
    if trainer.layout.buffers:
        _check_refusal(trainer, params_D, batch)
        return
    try:
        if _check_contributions(trainer, params_D, batch):
            _check_movement(trainer, clients)
        _check_gradients(trainer, clients)
    except SettingError as refusal:
        raise AssertionError(f"the trainer refuses DP-SGD for this model: {refusal}") from refusal


def _check_movement(trainer: Trainer, clients: Sequence[Examples]) -> None:
    """Check that one example more in a batch moves the clipped sum by at most the clip norm, also with dropout."""
    found = measure_sensitivity(trainer, sample_examples(clients, 1 + BATCH_SIZE, seed=1), rounds=(1,), is_quick=True)
    assert found.is_bounded, (
        f"one example moves the sum of DP-SGD by {found.movement:.3g} clip norms ({found.case}): a layer or the loss "
        "mixes examples, or the random numbers of an example depend on the other examples of its batch"
    )


def _check_gradients(trainer: Trainer, clients: Sequence[Examples]) -> None:
    """Check that DP-SGD trains each parameter that plain training trains."""
    batch = sample_examples(clients, BATCH_SIZE, seed=1)
    plain, private = (untrained_leaves(trainer, batch, private=is_private) for is_private in (False, True))
    lost = ", ".join(name for name in private if name not in plain)
    assert not lost, f"DP-SGD does not train {lost}: the clipped gradient is zero, but plain training has a gradient"


def _check_contributions(trainer: Trainer, params_D: np.ndarray, batch: Examples) -> bool:
    """Check that the contributions of single examples are clipped and add up to the sum of their batch.

    Returns:
        True if the model draws random numbers. Then contributions do not add up, and need another check.
    """
    singles = [_row(batch, n) for n in range(len(batch))]
    alone_ND = _summed(trainer, params_D, singles, None, 1.0)
    whole_D, again_D = (_summed(trainer, params_D, [batch], None, 1.0, client)[0] for client in (CLIENT, CLIENT + 2))
    norm_N = np.linalg.norm(alone_ND, axis=1)
    scale = max(float(norm_N.max()), float(np.linalg.norm(whole_D)))
    is_random = float(np.linalg.norm(whole_D - again_D)) > TOLERANCE * scale
    if not is_random:
        apart = float(np.linalg.norm(whole_D - alone_ND.sum(axis=0)))
        assert apart <= TOLERANCE * scale, (
            "the loss mixes the examples of a batch, so DP-SGD does not protect an example: the gradients of single "
            f"examples add up to another gradient than that of their batch (difference {apart / scale:.2g})"
        )
    else:
        _check_differences(trainer, params_D, batch, None, 1.0, scale)
    clip = 0.1 * float(np.median(norm_N[norm_N > 0])) if norm_N.any() else 1.0  # small, so all gradients are clipped
    _check_clipped(trainer, params_D, batch, clip, is_random=is_random)
    return is_random


def _check_clipped(trainer: Trainer, params_D: np.ndarray, batch: Examples, clip: float, *, is_random: bool) -> None:
    singles = [_row(batch, n) for n in range(len(batch))]
    alone_ND = _summed(trainer, params_D, singles, clip, 1 / clip)
    longest = float(np.linalg.norm(alone_ND, axis=1).max())
    assert longest <= clip * (1 + TOLERANCE), (
        f"DP-SGD must clip the gradient of an example to {clip:.3g}, but one contributes {longest:.3g}"
    )
    whole_D = _summed(trainer, params_D, [batch], clip, 1 / clip)[0]
    if not is_random:
        apart = float(np.linalg.norm(whole_D - alone_ND.sum(axis=0)))
        assert apart <= TOLERANCE * min(clip, longest * len(batch)) + 1e-6, (
            "in DP-SGD the contribution of an example must not depend on the other examples of its batch: "
            f"contributions add up to a sum that differs by {apart / clip:.2g} clip norms"
        )
    else:
        _check_differences(trainer, params_D, batch, clip, 1 / clip, min(clip, longest * len(batch)))
    for n in range(len(batch)):
        other_D = _summed(trainer, params_D, [_replaced(batch, n)], clip, 1 / clip)[0]
        moved = float(np.linalg.norm(whole_D - other_D))
        assert moved <= 2 * clip * (1 + TOLERANCE), (
            f"one replaced example must move the sum of DP-SGD by at most {2 * clip:.3g}, not {moved:.3g}"
        )


def _check_differences(
    trainer: Trainer, params_D: np.ndarray, batch: Examples, clip: float | None, learning_rate: float, scale: float
) -> None:
    """Check that the effect of one replaced example does not depend on another example, at equal random numbers."""
    first, second = 0, len(batch) // 2
    batches = [batch, _replaced(batch, first), _replaced(batch, second), _replaced(_replaced(batch, first), second)]
    a_D, b_D, c_D, d_D = _summed(trainer, params_D, batches, clip, learning_rate)
    apart = float(np.linalg.norm(a_D - b_D - c_D + d_D))
    assert apart <= TOLERANCE * scale + 1e-6, (
        "the loss mixes the examples of a batch, so DP-SGD does not protect an example: the contribution of an example "
        f"changes with another example (difference {apart / max(scale, 1e-12):.2g})"
    )


def _check_refusal(trainer: Trainer, params_D: np.ndarray, batch: Examples) -> None:
    """Check that the trainer refuses DP-SGD for a model with batch statistics, because they mix examples."""
    try:
        _summed(trainer, params_D, [batch], 1.0, 1.0)
    except SettingError:
        return
    raise AssertionError("DP-SGD must be refused for a model with buffers: batch statistics mix examples")


def _summed(
    trainer: Trainer,
    params_D: np.ndarray,
    parts: Sequence[Examples],
    clip: float | None,
    learning_rate: float,
    client: int = CLIENT,
) -> np.ndarray:
    """Return the sum of clipped gradients of each part, from one step on all its examples without noise."""
    size = len(parts[0])
    dp = None if clip is None else ExampleDP(clip=clip, noise_multiplier=0.0)
    local = LocalSettings(steps=1, batch_size=size, learning_rate=learning_rate * size, example_dp=dp)
    request = Request(round=1, seed=1, params_D=params_D, local=local)
    work = [ClientWork(client=client, examples=part) for part in parts]
    try:  # one client at a time, because a process pool reads the examples of each client itself
        delta_KD = np.concatenate([as_numpy(trainer.fit(request, plain_training, [item]).delta_KD) for item in work])
    except Exception as error:
        if size > 1 or isinstance(error, SettingError):
            raise
        raise AssertionError(
            f"a batch of one example must train, because DP-SGD draws such batches: {error}"
        ) from error
    return delta_KD.astype(np.float64) / -learning_rate


def _batch(clients: Sequence[Examples]) -> Examples:
    x, y = (np.concatenate([np.asarray(getattr(item, name)) for item in clients]) for name in ("x", "y"))
    rows = np.unique(np.linspace(0, len(y) - 1, BATCH_SIZE).astype(int))
    return Examples(x[rows], y[rows])


def _row(batch: Examples, n: int) -> Examples:
    return Examples(batch.x[n : n + 1], batch.y[n : n + 1])


def _replaced(batch: Examples, n: int) -> Examples:
    """Replace one example of a batch by the next example."""
    rows = np.arange(len(batch))
    rows[n] = (n + 1) % len(batch)
    return Examples(batch.x[rows], batch.y[rows])
