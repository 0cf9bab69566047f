"""Metrics of held-out examples with confidence intervals: sums over examples for most, one sort for areas.

Shapes: N examples, C classes, M sums, R replicates, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedlearn.callbacks.run_history import finite_or_none
from fedlearn.core.intervals import Bootstrap, RankedScores, interval_of, wilson_interval
from fedlearn.core.score_curves import NUM_BINS, brier_scores
from fedlearn.core.tasks.classification import confusion_scores, log_softmax
from fedlearn.data.preprocessing import Target
from fedlearn.runner.evaluation.held_out import HeldOut

MAX_CLASSES = 20  # with more classes, there are no values of single classes
MAX_CELLS = 20_000_000  # cells of the confusion matrices of all examples; more take too much memory
BIASED = ("ece",)  # a replicate overestimates it, so that its percentiles are no interval

MAX_RECOMPUTED, NUM_RECOMPUTED = 500, 200  # examples and replicates for metrics that compare all pairs of examples

Recompute = Callable[[np.ndarray], float]
Finish = Callable[[np.ndarray], dict[str, np.ndarray]]  # sums (R, M) -> name -> values (R,)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Parts from which the metrics of any weighting of the examples follow.

    Attributes:
        value_NM: values that are added over examples.
        finish: function from sums ``(R, M)`` to metrics.
        rankings: name of the class -> ranking of its examples, for the areas under curves.
        has_auprc: whether the average precision is a metric.
        fixed: metrics without interval.
        shares: name -> number of examples that count, and of all examples, for a metric that is a share of them.
        recompute: name -> function from positions of examples to the metric, for metrics that need all outputs.
    """

    value_NM: np.ndarray
    finish: Finish
    rankings: Mapping[str, RankedScores] = field(default_factory=dict)
    has_auprc: bool = False
    fixed: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    recompute: Mapping[str, Recompute] = field(default_factory=dict)

    def joined(self, other: Scores) -> Scores:
        """Return the scores of both. Only these scores may have rankings."""
        width = self.value_NM.shape[1]
        return replace(
            self,
            value_NM=np.concatenate([self.value_NM, other.value_NM], axis=1),
            finish=lambda sum_RM: self.finish(sum_RM[:, :width]) | other.finish(sum_RM[:, width:]),
            fixed={**self.fixed, **other.fixed},
            recompute={**self.recompute, **other.recompute},
        )

    @property
    def values(self) -> dict[str, float]:
        """Metrics of all held-out examples, by name."""
        ones_1N = np.ones((1, len(self.value_NM)))
        found = self.metrics(ones_1N, ones_1N @ self.value_NM)
        rows = np.arange(len(self.value_NM))
        whole = {name: function(rows) for name, function in self.recompute.items()}
        return {name: float(value_1[0]) for name, value_1 in found.items()} | whole | dict(self.fixed)

    def metrics(self, weight_RN: np.ndarray | None, sum_RM: np.ndarray) -> dict[str, np.ndarray]:
        """Return name -> values ``(R,)``. Without weights, areas are absent."""
        values = self.finish(sum_RM)
        if not self.rankings or weight_RN is None:
            return values
        areas = np.array([ranking.areas(weight_RN) for ranking in self.rankings.values()])  # (classes, 2, R)
        mean = _mean_of_defined(areas[:, 0])
        return values | {"auc": mean} | ({"auprc": areas[0, 1]} if self.has_auprc else {})


def estimates(
    scores: Scores, bootstrap: Bootstrap | None, rng: np.random.Generator
) -> dict[str, dict[str, float | None]]:
    """Return name -> ``value``, ``low`` and ``high`` of each metric. Undefined values are None.

    Args:
        scores: parts of the metrics.
        bootstrap: draws for the intervals; None gives values without intervals.
        rng: random numbers of the bootstrap.
    """
    values = scores.values
    intervals = dict.fromkeys(values, (math.nan, math.nan))
    if bootstrap is not None:
        sums_UM = bootstrap.unit_sums(scores.value_NM)
        blocks = [
            scores.metrics(weight_RU[:, bootstrap.unit_N] if scores.rankings else None, weight_RU @ sums_UM)
            for weight_RU in bootstrap.weights(rng)
        ]
        names = [name for name in blocks[0] if name not in BIASED]
        intervals |= {name: interval_of(np.concatenate([block[name] for block in blocks])) for name in names}
        intervals |= _recomputed_intervals(scores, bootstrap, rng)
        intervals |= {
            name: wilson_interval(*scores.shares[name]) if name in scores.shares else (math.nan, math.nan)
            for name, (low, high) in intervals.items()
            if low == high  # all replicates are equal, e.g. for a model without an error
        }
    return {
        name: dict(zip(("value", "low", "high"), map(finite_or_none, (value, *intervals[name])), strict=True))
        for name, value in values.items()
    }


def _recomputed_intervals(
    scores: Scores, bootstrap: Bootstrap, rng: np.random.Generator
) -> dict[str, tuple[float, float]]:
    """Return the intervals of metrics that need all outputs; none for many examples, because each replicate is slow."""
    if not scores.recompute or len(bootstrap.unit_N) > MAX_RECOMPUTED:
        return {}
    weight_RN = next(bootstrap.weights(rng))[:NUM_RECOMPUTED, bootstrap.unit_N].astype(np.int64)
    drawn = [np.repeat(np.arange(len(weight_N)), weight_N) for weight_N in weight_RN]
    return {
        name: interval_of(np.array([function(rows) for rows in drawn])) for name, function in scores.recompute.items()
    }


def _mean_of_defined(value_CR: np.ndarray) -> np.ndarray:
    is_defined_CR = np.isfinite(value_CR)
    count_R = is_defined_CR.sum(axis=0)
    total_R = np.where(is_defined_CR, value_CR, 0.0).sum(axis=0)
    return np.where(count_R > 0, total_R / np.maximum(count_R, 1), np.nan)


def regression_scores(held_out: HeldOut, target: Target) -> Scores:
    """Return the scores of a regression: RMSE and MAE in the unit of the target, R2, and the loss."""
    truth_N = target.centre + target.spread * np.asarray(held_out.targets_N, np.float64)
    error_N = truth_N - target.values(held_out.outputs_NC)
    centred_N = truth_N - truth_N.mean()
    value_NM = np.stack([np.ones_like(error_N), error_N**2, abs(error_N), centred_N, centred_N**2], axis=1)

    def finish(sum_RM: np.ndarray) -> dict[str, np.ndarray]:
        count, squared, absolute, total, total_squared = sum_RM.T
        with np.errstate(all="ignore"):
            mse, spread = squared / count, total_squared - total**2 / count
            r2 = np.where((count > 1) & (spread > 0), 1 - squared / spread, np.nan)
        return {"loss": mse / target.spread**2, "rmse": np.sqrt(mse), "mae": absolute / count, "r2": r2}

    return Scores(value_NM=value_NM, finish=finish)


def classification_scores(held_out: HeldOut, target: Target) -> Scores:
    """Return the scores of a classification with probabilities."""
    probability_NC = target.probabilities(held_out.outputs_NC)
    num_classes, target_N = probability_NC.shape[1], held_out.targets_N.astype(np.int64)
    predicted_N = target.class_numbers(held_out.outputs_NC)
    log_p_NC = _log_probabilities(held_out.outputs_NC)
    rows_N = np.arange(len(target_N))
    fixed = [np.ones(len(target_N)), predicted_N == target_N, -log_p_NC[rows_N, target_N]]
    fixed += [brier_scores(probability_NC, target_N)]
    confidence_N, is_right_N = confidences(probability_NC, predicted_N, target_N)
    bin_N = np.searchsorted(np.linspace(0, 1, NUM_BINS + 1)[1:-1], confidence_N)
    gap_NB = np.zeros((len(target_N), NUM_BINS))
    gap_NB[rows_N, bin_N] = confidence_N - is_right_N
    has_classes = num_classes <= MAX_CLASSES and len(target_N) * num_classes**2 <= MAX_CELLS
    cells_NM = _one_hot(target_N * num_classes + predicted_N, num_classes**2) if has_classes else gap_NB[:, :0]

    def finish(sum_RM: np.ndarray) -> dict[str, np.ndarray]:
        count, right, loss, brier = sum_RM[:, :4].T
        values = {"loss": loss / count, "accuracy": right / count, "brier": brier / count}
        values["ece"] = abs(sum_RM[:, 4 : 4 + NUM_BINS]).sum(axis=1) / count
        if has_classes:
            confusion_RCC = sum_RM[:, 4 + NUM_BINS :].reshape(-1, num_classes, num_classes)
            values |= confusion_scores(confusion_RCC, target.task)
            values["balanced_accuracy"] = balanced_accuracies(confusion_RCC)
        return values

    value_NM = np.concatenate([np.stack(fixed, axis=1), gap_NB, cells_NM], axis=1)
    is_ranked = has_classes and not held_out.are_sequences
    rankings = _rankings(log_p_NC, target_N, target) if is_ranked else {}
    shares = {"accuracy": (int((predicted_N == target_N).sum()), len(target_N))}
    return Scores(value_NM=value_NM, finish=finish, rankings=rankings, has_auprc=num_classes == 2, shares=shares)


def _rankings(log_p_NC: np.ndarray, target_N: np.ndarray, target: Target) -> dict[str, RankedScores]:
    """Return the ranking of each class that occurs. For two classes, only the ranking of the positive class."""
    if len(target.classes) == 2:
        return {target.classes[1]: RankedScores(log_p_NC[:, 1] - log_p_NC[:, 0], target_N == 1)}
    labels = np.flatnonzero(np.bincount(target_N, minlength=len(target.classes))).tolist()
    return {target.classes[label]: RankedScores(log_p_NC[:, label], target_N == label) for label in labels}


def confidences(
    probability_NC: np.ndarray, predicted_N: np.ndarray, target_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability whose calibration is judged, and whether its event occurred.

    For two classes this is the positive class; for more classes, the predicted class.
    """
    if probability_NC.shape[1] == 2:
        return probability_NC[:, 1], target_N == 1
    return probability_NC[np.arange(len(target_N)), predicted_N], predicted_N == target_N


def balanced_accuracies(confusion_RCC: np.ndarray) -> np.ndarray:
    """Return the mean recall over the classes that occur, for each of R confusion matrices (targets x predictions)."""
    target_RC, hit_RC = confusion_RCC.sum(axis=2), np.diagonal(confusion_RCC, axis1=1, axis2=2)
    occurs_RC = target_RC > 0
    recall_RC = np.where(occurs_RC, hit_RC / np.where(occurs_RC, target_RC, 1), 0.0)
    return np.asarray(recall_RC.sum(axis=1) / np.maximum(occurs_RC.sum(axis=1), 1))


def _log_probabilities(outputs_NC: np.ndarray) -> np.ndarray:
    if outputs_NC.shape[1] == 1:
        logit_N = outputs_NC[:, 0]
        return np.stack([-np.logaddexp(0, logit_N), -np.logaddexp(0, -logit_N)], axis=1)
    return log_softmax(outputs_NC)


def _one_hot(number_N: np.ndarray, count: int) -> np.ndarray:
    encoded_NM = np.zeros((len(number_N), count))
    encoded_NM[np.arange(len(number_N)), number_N] = 1.0
    return encoded_NM


def json_estimate(value: float, interval: tuple[float, float], **counts: Any) -> dict[str, Any]:
    """Return a value and its interval as JSON values, with counts such as ``num_examples``."""
    low, high = map(finite_or_none, interval)
    return {"value": finite_or_none(value), "low": low, "high": high, **counts}
