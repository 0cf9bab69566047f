"""Curves of a score against the truth: ROC, precision and recall, and calibration.

Shapes: N examples, P points of a curve, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_BINS = 10  # bins of equal width of a reliability curve


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of a curve.

    Attributes:
        x_P: horizontal coordinates.
        y_P: vertical coordinates.
    """

    x_P: np.ndarray
    y_P: np.ndarray

    def thinned(self, max_points: int) -> Curve:
        """Return at most ``max_points`` of the points, evenly spaced, with the first and the last."""
        if len(self.x_P) <= max_points:
            return self
        kept = np.unique(np.linspace(0, len(self.x_P) - 1, max_points).round().astype(np.int64))
        return Curve(x_P=self.x_P[kept], y_P=self.y_P[kept])


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Bins of predicted probabilities. A bin without examples has NaN.

    Attributes:
        edge_E: the B + 1 edges of the bins.
        count_B: number of examples.
        predicted_B: mean predicted probability.
        observed_B: share of examples that are positive.
    """

    edge_E: np.ndarray
    count_B: np.ndarray
    predicted_B: np.ndarray
    observed_B: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance between predicted and observed, weighted by the examples of the bins; NaN without examples.

        Reference: Guo, Pleiss, Sun, Weinberger, *On Calibration of Modern Neural Networks*, ICML 2017,
        arXiv:1706.04599.
        """
        filled_B = self.count_B > 0
        if not filled_B.any():
            return float("nan")
        distance = abs(self.predicted_B[filled_B] - self.observed_B[filled_B])
        return float(np.average(distance, weights=self.count_B[filled_B]))


def roc_curve(score_N: np.ndarray, positive_N: np.ndarray) -> Curve:
    """Return the false positive rate (x) and the true positive rate (y) at each threshold, from (0, 0) to (1, 1).

    Args:
        score_N: scores; a high score means positive.
        positive_N: True for a positive example. Both kinds of examples occur.
    """
    hits_P, misses_P = _counts_above(score_N, positive_N)
    return Curve(x_P=np.append(0, misses_P) / misses_P[-1], y_P=np.append(0, hits_P) / hits_P[-1])


def precision_recall_curve(score_N: np.ndarray, positive_N: np.ndarray) -> Curve:
    """Return recall (x) and precision (y) at each threshold, with ascending recall. The first point is (0, 1).

    Args:
        score_N: scores; a high score means positive.
        positive_N: True for a positive example. At least one is positive.
    """
    hits_P, misses_P = _counts_above(score_N, positive_N)
    return Curve(x_P=np.append(0, hits_P / hits_P[-1]), y_P=np.append(1, hits_P / (hits_P + misses_P)))


def _counts_above(score_N: np.ndarray, positive_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of positive and of negative examples from each distinct score upwards, highest score first."""
    order_N = np.argsort(-score_N, kind="stable")
    score_N, positive_N = score_N[order_N], positive_N[order_N].astype(bool)
    end_P = np.append(np.flatnonzero(np.diff(score_N)), len(score_N) - 1)
    hits_P = np.cumsum(positive_N)[end_P]
    return hits_P, end_P + 1 - hits_P


def reliability_curve(probability_N: np.ndarray, positive_N: np.ndarray, num_bins: int = NUM_BINS) -> Reliability:
    """Return bins of equal width over [0, 1]. A probability on an inner edge counts for the lower bin.

    Args:
        probability_N: predicted probabilities, in [0, 1].
        positive_N: True for a positive example.
        num_bins: number of bins, >= 1; default 10.
    """
    edge_E = np.linspace(0.0, 1.0, num_bins + 1)
    bin_N = np.searchsorted(edge_E[1:-1], probability_N)
    count_B = np.bincount(bin_N, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        predicted_B = np.bincount(bin_N, weights=probability_N, minlength=num_bins) / count_B
        observed_B = np.bincount(bin_N, weights=positive_N.astype(np.float64), minlength=num_bins) / count_B
    return Reliability(edge_E=edge_E, count_B=count_B, predicted_B=predicted_B, observed_B=observed_B)


def brier_scores(probability_NC: np.ndarray, target_N: np.ndarray) -> np.ndarray:
    """Return the Brier score of each example: the sum over classes of the squared error of the probability.

    For two classes it is the squared error of one of them, which is the usual scale, in [0, 1].

    Reference: Brier, *Verification of Forecasts Expressed in Terms of Probability*, Monthly Weather Review 78, 1950.

    Args:
        probability_NC: probability of each class.
        target_N: number of the true class.
    """
    is_target_NC = np.arange(probability_NC.shape[1]) == target_N[:, None]
    total_N = np.square(probability_NC - is_target_NC).sum(axis=1)
    return np.asarray(total_N / 2 if probability_NC.shape[1] == 2 else total_N)
