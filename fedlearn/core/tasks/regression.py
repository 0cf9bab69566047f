"""Define the task ``regression``: one real target per example.

Shapes: K segments, N examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlearn.core.metric import Metric, Sums
from fedlearn.core.segments import Segments
from fedlearn.core.tasks.base import Task
from fedlearn.errors import DataError

CONSTANT = 1e-6  # targets with a smaller range than this share of their largest magnitude count as constant
R2_FLOOR = -1.0  # smallest R2 of a client: lower values say nothing more, and would rule the mean over clients


def error_sums(outputs_NC: np.ndarray, targets_N: np.ndarray) -> Sums:
    """Return squared and absolute error, target and squared target of each example."""
    targets_N = np.asarray(targets_N, np.float64)
    error_N = targets_N - outputs_NC[:, 0]
    columns = {"squared_error": error_N**2, "absolute_error": abs(error_N)}
    return columns | {"target": targets_N, "target_squared": targets_N**2}


def _squared(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.asarray(totals["squared_error"] / totals["count"])


def _root(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.sqrt(_squared(totals))


def _absolute(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.asarray(totals["absolute_error"] / totals["count"])


def _r2_from_sums(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    spread = totals["target_squared"] - totals["target"] ** 2 / totals["count"]
    return np.where((totals["count"] >= 2) & (spread > 0), 1 - totals["squared_error"] / spread, np.nan)


def _r2(segments: Segments, outputs_NC: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """Return R2 of each segment; NaN for fewer than two examples, and for targets that are constant but for rounding.

    The deviations from the mean are exact, where the difference of two sums is not.
    """
    targets_N = targets_N.astype(np.float64)
    spread_N = targets_N - segments.mean(targets_N)[segments.index_N]
    spread_K, squared_K = segments.sum(spread_N**2), segments.sum((targets_N - outputs_NC[:, 0]) ** 2)
    range_K = np.maximum.reduceat(targets_N, segments.start_K) - np.minimum.reduceat(targets_N, segments.start_K)
    largest_K = np.maximum.reduceat(abs(targets_N), segments.start_K)
    is_defined_K = (segments.sizes_K >= 2) & (range_K > CONSTANT * largest_K)
    return np.where(is_defined_K, 1 - squared_K / spread_K, np.nan)


def value_targets(y: np.ndarray) -> np.ndarray:
    """Return real targets ``(N,)`` as float32.

    Raises:
        DataError: there is more than one target per example.
    """
    if y.ndim != 1:
        raise DataError(f"y has shape {y.shape}, expected one target per example")
    return y.astype(np.float32)


REGRESSION = Task(
    name="regression",
    metrics=(
        Metric(name="loss", sums=error_sums, finish=_squared, higher_is_better=False),
        Metric(name="rmse", sums=error_sums, finish=_root, higher_is_better=False, in_target_unit=True),
        Metric(name="mae", sums=error_sums, finish=_absolute, higher_is_better=False, in_target_unit=True),
        Metric(name="r2", sums=error_sums, finish=_r2_from_sums, whole=_r2, client_floor=R2_FLOOR),
    ),
    main_metric="rmse",
    targets=value_targets,
)
