"""Define the tasks ``binary`` and ``multiclass``: one class per example.

Shapes: K segments, N examples, C outputs or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from fedlearn.core.metric import Metric, Sums
from fedlearn.core.segments import Counts, Segments
from fedlearn.core.tasks.base import Task, output_per_class
from fedlearn.errors import DataError

Totals = Mapping[str, np.ndarray]


def binary_loss(logit_N: np.ndarray, positive_N: np.ndarray) -> np.ndarray:
    """Return the log loss of each example, in nats."""
    return np.logaddexp(0, np.where(positive_N, -logit_N, logit_N))


def log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Return log-probabilities that stay distinct near 0, so that confident examples do not tie in a ranking.

    The sum omits its largest term, and log1p adds it.
    """
    shifted_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    others_NC = np.exp(shifted_NC)
    np.put_along_axis(others_NC, logits_NC.argmax(axis=1)[:, None], 0.0, axis=1)
    return shifted_NC - np.log1p(others_NC.sum(axis=1, keepdims=True))


def class_targets(y: np.ndarray, *, task: str, num_classes: int | None = None) -> np.ndarray:
    """Return class numbers ``(N,)`` as int64.

    Args:
        y: class numbers from 0.
        task: name of the task, for messages.
        num_classes: number of classes; None for any number.

    Raises:
        DataError: a value is not the number of a class.
    """
    if y.ndim != 1:
        raise DataError(f"y has shape {y.shape}, expected one target per example")
    classes = y.astype(np.int64)
    is_high = num_classes is not None and classes.max(initial=0) >= num_classes
    if not np.array_equal(classes, y) or classes.min(initial=0) < 0 or is_high:
        more = "" if num_classes else ", ..."
        raise DataError(f"y has other values than the class numbers of a {task} task (0, 1{more})")
    return classes


def count_class_numbers(y: np.ndarray) -> int:
    """Return the number of classes of class numbers, at least 2."""
    return max(2, int(y.max(initial=0)) + 1)


def log_loss_sums(outputs_NC: np.ndarray, targets_N: np.ndarray) -> Sums:
    """Return the log loss of each example, for one logit or for one logit per class."""
    if outputs_NC.shape[1] == 1:
        return {"loss": binary_loss(outputs_NC[:, 0], targets_N == 1)}
    log_p_NC = log_softmax(outputs_NC) if len(outputs_NC) else outputs_NC
    return {"loss": -log_p_NC[np.arange(len(targets_N)), targets_N.astype(np.int64)]}


def confusion_sums(outputs_NC: np.ndarray, targets_N: np.ndarray) -> Sums:
    """Return the cell of each example in the confusion matrix, targets x predictions."""
    is_binary = outputs_NC.shape[1] == 1
    predicted_N = outputs_NC[:, 0] > 0 if is_binary else outputs_NC.argmax(axis=1)
    num_classes = 2 if is_binary else outputs_NC.shape[1]
    cells_N = np.asarray(targets_N).astype(np.int64) * num_classes + predicted_N.astype(np.int64)
    return {"confusion": Counts(cells_N, (num_classes, num_classes))}


def mean_loss(totals: Totals) -> np.ndarray:
    """Return the mean loss over the examples."""
    return np.asarray(totals["loss"] / totals["count"])


def accuracy(totals: Totals) -> np.ndarray:
    """Return the share of examples with the correct class."""
    confusion = totals["confusion"]
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).sum(axis=-1)
    return np.asarray(hits / np.maximum(confusion.sum(axis=-1).sum(axis=-1), 1))


def class_scores(totals: Totals, *, score: str) -> np.ndarray:
    """Return precision, recall or F1 of each class, ``(..., C)``; 0 for a class without predictions or targets.

    Args:
        totals: the sum ``confusion``, targets x predictions.
        score: ``precision``, ``recall`` or ``f1``.
    """
    confusion = totals["confusion"]
    hit, target = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1)
    predicted = confusion.sum(axis=-2)
    part, whole = {
        "precision": (hit, predicted),
        "recall": (hit, target),
        "f1": (2 * hit, target + predicted),
    }[score]
    return np.asarray(np.where(whole > 0, part / np.maximum(whole, 1), 0.0))


def positive_score(totals: Totals, *, score: str) -> np.ndarray:
    """Return the score of class 1."""
    return np.asarray(class_scores(totals, score=score)[..., 1])


def macro_score(totals: Totals, *, score: str) -> np.ndarray:
    """Return the mean score over the classes that occur in targets or predictions."""
    confusion = totals["confusion"]
    occurs = (confusion.sum(axis=-1) + confusion.sum(axis=-2)) > 0
    return np.asarray(class_scores(totals, score=score).sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1))


def confusion_matrix(outputs_NC: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """Return the confusion counts (targets x predictions) of all examples, ``(C, C)``; N >= 1."""
    cells = confusion_sums(outputs_NC, targets_N)["confusion"]
    return np.asarray(Segments(np.array([len(targets_N)])).sum(cells)[0])


def confusion_scores(confusion_KCC: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    """Return each metric of a classification that follows from confusion counts, K values for each name."""
    totals = {"confusion": confusion_KCC, "count": confusion_KCC.sum(axis=-1).sum(axis=-1)}
    return {
        metric.name: metric.finish(totals)
        for metric in task.metrics
        if metric.sums is confusion_sums and metric.finish is not None
    }


def _binary_auc(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    return segments.ranking(outputs_NC[:, 0]).roc_auc(targets_N == 1)


def _average_precision(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    return segments.ranking(outputs_NC[:, 0]).average_precision(targets_N == 1)


def _macro_auc(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """Return the mean AUC, one class versus the rest, over the classes that a segment has."""
    targets_N = targets_N.astype(np.int64)  # float if a client without examples is among the clients
    log_p_NC, num_classes = log_softmax(outputs_NC), outputs_NC.shape[1]
    occurs_KC = segments.sum(Counts(targets_N, (num_classes,))) > 0
    area_K = np.zeros(len(segments.sizes_K))
    for label in np.flatnonzero(occurs_KC.any(axis=0)):
        label_area_K = segments.ranking(np.ascontiguousarray(log_p_NC[:, label])).roc_auc(targets_N == label)
        area_K += np.where(occurs_KC[:, label], label_area_K, 0.0)
    return np.asarray(area_K / occurs_KC.sum(axis=1))


def _scores(average: Callable[..., np.ndarray]) -> tuple[Metric, ...]:
    return tuple(
        Metric(name=score, sums=confusion_sums, finish=partial(average, score=score))
        for score in ("precision", "recall", "f1")
    )


def binary_probabilities(outputs_NC: np.ndarray) -> np.ndarray:
    """Return the probabilities of both classes, ``(N, 2)``, for one logit."""
    positive_N = np.exp(-np.logaddexp(0, -outputs_NC[:, 0]))
    return np.stack([1 - positive_N, positive_N], axis=1)


def softmax(outputs: np.ndarray, axis: int = 1) -> np.ndarray:
    """Return the probabilities of the classes on an axis of the outputs."""
    shifted = np.exp(outputs - outputs.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True))


def _decide_binary(outputs_NC: np.ndarray, threshold: float) -> np.ndarray:
    return (binary_probabilities(outputs_NC)[:, 1] > threshold).astype(np.int64)


def _decide_multiclass(outputs_NC: np.ndarray, threshold: float) -> np.ndarray:
    return np.asarray(softmax(outputs_NC).argmax(axis=1))


LOG_LOSS = Metric(name="loss", sums=log_loss_sums, finish=mean_loss, higher_is_better=False)
ACCURACY = Metric(name="accuracy", sums=confusion_sums, finish=accuracy)
BINARY = Task(
    name="binary",
    metrics=(
        LOG_LOSS,
        ACCURACY,
        Metric(name="auc", whole=_binary_auc),
        Metric(name="auprc", whole=_average_precision),
        *_scores(positive_score),
    ),
    main_metric="accuracy",
    targets=partial(class_targets, task="binary", num_classes=2),
    count_classes=count_class_numbers,
    has_classes=True,
    is_classification=True,
    positions_are_examples=True,
    probabilities=binary_probabilities,
    decide=_decide_binary,
    has_threshold=True,
)
MULTICLASS = Task(
    name="multiclass",
    metrics=(LOG_LOSS, ACCURACY, Metric(name="auc", whole=_macro_auc), *_scores(macro_score)),
    main_metric="accuracy",
    targets=partial(class_targets, task="multiclass"),
    count_classes=count_class_numbers,
    num_outputs=output_per_class,
    has_classes=True,
    is_classification=True,
    positions_are_examples=True,
    probabilities=softmax,
    decide=_decide_multiclass,
)
