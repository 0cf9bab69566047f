"""Define the task ``multilabel``: some of several labels per example.

Targets are ``(N, L)``, 1 for a label that applies, else 0. A model has one logit per label. The loss of an example is
the mean of its binary cross-entropies.

Shapes: K segments, N examples, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlearn.core.metric import Metric, Sums
from fedlearn.core.segments import Segments
from fedlearn.core.tasks.base import Task, output_per_class
from fedlearn.core.tasks.classification import binary_loss, mean_loss
from fedlearn.errors import DataError


def label_targets(y: np.ndarray) -> np.ndarray:
    """Return labels ``(N, L)`` as int64.

    Raises:
        DataError: a value is neither 0 nor 1.
    """
    if y.ndim != 2 or not y.shape[1]:
        raise DataError(f"y has shape {y.shape}, expected (N, L): one value for each label")
    if not np.isin(y, (0, 1)).all():
        raise DataError("y has a label that is neither 0 nor 1\n  expected  1 for a label that applies, else 0")
    return y.astype(np.int64)


def _loss_sums(outputs_NL: np.ndarray, targets_NL: np.ndarray) -> Sums:
    return {"loss": binary_loss(outputs_NL, targets_NL == 1).mean(axis=1)}


def _label_sums(outputs_NL: np.ndarray, targets_NL: np.ndarray) -> Sums:
    """Return hits, predictions and targets of each label, and 1 for an example whose labels are all correct."""
    predicted_NL, is_label_NL = outputs_NL > 0, targets_NL == 1
    parts = {"hits": predicted_NL & is_label_NL, "predicted": predicted_NL, "targets": is_label_NL}
    sums = {name: part.astype(np.float64) for name, part in parts.items()}
    return {**sums, "exact": (predicted_NL == is_label_NL).all(axis=1).astype(np.float64)}


def _f1(hits: np.ndarray, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
    whole = predicted + targets
    return np.where(whole > 0, 2 * hits / np.maximum(whole, 1), 0.0)


def _macro_f1(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the mean F1 of the labels; 0 for a label without targets and predictions."""
    return np.asarray(_f1(totals["hits"], totals["predicted"], totals["targets"]).mean(axis=-1))


def _micro_f1(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the F1 of all labels together."""
    return _f1(*(totals[name].sum(axis=-1) for name in ("hits", "predicted", "targets")))


def _exact_match(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.asarray(totals["exact"] / totals["count"])


def _mean_average_precision(segments: Segments, outputs_NL: np.ndarray, targets_NL: np.ndarray) -> np.ndarray:
    """Return the mean average precision over the labels that occur in a segment; NaN without a label."""
    columns = [np.ascontiguousarray(outputs_NL[:, label]) for label in range(outputs_NL.shape[1])]
    value_LK = np.stack(
        [segments.ranking(score_N).average_precision(targets_NL[:, k] == 1) for k, score_N in enumerate(columns)]
    )
    is_defined_LK = np.isfinite(value_LK)
    return np.asarray(np.where(is_defined_LK, value_LK, 0.0).sum(axis=0) / is_defined_LK.sum(axis=0))


def label_probabilities(outputs_NL: np.ndarray) -> np.ndarray:
    """Return the probability of each label, ``(N, L)``. Labels are independent, so a row does not add up to 1."""
    return np.asarray(np.exp(-np.logaddexp(0, -outputs_NL)))


def _decide(outputs_NL: np.ndarray, threshold: float) -> np.ndarray:
    return (label_probabilities(outputs_NL) > threshold).astype(np.int64)


def _example(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((1, num_classes)), np.zeros((1, num_classes), np.int64)


MULTILABEL = Task(
    name="multilabel",
    metrics=(
        Metric(name="loss", sums=_loss_sums, finish=mean_loss, higher_is_better=False),
        Metric(name="macro_f1", sums=_label_sums, finish=_macro_f1),
        Metric(name="micro_f1", sums=_label_sums, finish=_micro_f1),
        Metric(name="map", whole=_mean_average_precision),
        Metric(name="exact_match", sums=_label_sums, finish=_exact_match),
    ),
    main_metric="macro_f1",
    targets=label_targets,
    num_outputs=output_per_class,
    strata=lambda y: np.unique(np.asarray(y), axis=0, return_inverse=True)[1].reshape(-1),
    probabilities=label_probabilities,
    decide=_decide,
    has_threshold=True,
    example=_example,
)
