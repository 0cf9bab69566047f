"""Evaluate a model on the held-out examples of a client with differential privacy.

Shapes: N examples, C classes.

A client releases two vectors of integers: the confusion matrix, and the sum of the losses. The losses are clipped to
``2 log C`` and rounded to `LOSS_STEPS` steps. One example more or less moves the matrix by 1 and the sum of the losses
by at most `LOSS_STEPS`. Each vector gets two-sided geometric noise for half of epsilon, so the release of both is
(epsilon, 0)-private for adding or removing one held-out example. Everything else follows from these two vectors.

Reference: Ghosh, Roughgarden, Sundararajan, *Universally Utility-Maximizing Privacy Mechanisms*, STOC 2009.
"""

from __future__ import annotations

from math import exp, log

import numpy as np

from fedlearn.core.metrics import combine_evaluations
from fedlearn.core.random import secret_uniforms
from fedlearn.core.records import ClientEvaluation, Predictions
from fedlearn.core.tasks import Task

LOSS_STEPS = 1000  # steps from loss 0 to the largest loss


def has_bounded_sums(task: Task) -> bool:
    """Return whether all sums of a task are the loss and a confusion matrix, which have bounds. Noise needs bounds."""
    return task.is_classification and not task.num_added


def noisy_evaluation(predictions: Predictions, *, task: Task, num_classes: int, epsilon: float) -> ClientEvaluation:
    """Return the evaluation of a client with noise from the operating system's generator.

    Args:
        predictions: outputs ``(N, C)``, or ``(N, 1)`` for ``binary``, and targets ``(N,)``.
        task: a task with `has_bounded_sums`.
        num_classes: number of classes, C.
        epsilon: privacy loss of the release, > 0.

    Returns:
        Noisy sums, and the metrics that follow from them; other metrics, for example AUC, are NaN.
    """
    logits_NC, targets_N = _logits(predictions), np.asarray(predictions.targets, np.int64)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (targets_N, logits_NC.argmax(axis=1)), 1)
    loss = _loss_steps(logits_NC, targets_N, num_classes).sum()
    confusion = np.maximum(confusion + geometric_noise(confusion.shape, 1, epsilon / 2), 0)
    loss = max(0, int(loss + geometric_noise((), LOSS_STEPS, epsilon / 2)))
    sums = {
        "loss": np.asarray(loss * _max_loss(num_classes) / LOSS_STEPS, np.float64),
        "confusion": confusion.astype(np.float64),
    }
    count = max(1, int(confusion.sum()))
    unknown = dict.fromkeys(task.metric_names, float("nan"))
    noisy = ClientEvaluation(client=predictions.client, num_examples=count, metrics=unknown, sums=sums)
    metrics = dict(combine_evaluations([noisy], task=task).pooled)
    return ClientEvaluation(client=noisy.client, num_examples=count, metrics=metrics, sums=sums)


def geometric_noise(shape: tuple[int, ...], sensitivity: int, epsilon: float) -> np.ndarray:
    """Return two-sided geometric noise, int64: ``P(k)`` is proportional to ``exp(-epsilon |k| / sensitivity)``.

    Args:
        shape: shape of the result.
        sensitivity: largest change of the sum of absolute values, >= 1.
        epsilon: privacy loss, > 0.
    """
    decay = exp(-epsilon / sensitivity)
    first, second = np.floor(np.log1p(-secret_uniforms((2, *shape))) / log(decay)).astype(np.int64)
    return np.asarray(first - second)


def _logits(predictions: Predictions) -> np.ndarray:
    """Return finite logits of all classes, ``(N, C)``."""
    outputs_NC = np.nan_to_num(np.asarray(predictions.outputs, np.float64), posinf=1e6, neginf=-1e6)
    if outputs_NC.shape[1] == 1:
        outputs_NC = np.concatenate([np.zeros_like(outputs_NC), outputs_NC], axis=1)
    return outputs_NC


def _loss_steps(logits_NC: np.ndarray, targets_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the clipped log loss of each example, in steps from 0 to `LOSS_STEPS`, ``(N,)``."""
    shifted_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    loss_N = np.log(np.exp(shifted_NC).sum(axis=1)) - shifted_NC[np.arange(len(targets_N)), targets_N]
    share_N = np.clip(loss_N / _max_loss(num_classes), 0, 1)
    return np.round(LOSS_STEPS * share_N).astype(np.int64)


def _max_loss(num_classes: int) -> float:
    return 2 * log(max(2, num_classes))
