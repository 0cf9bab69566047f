"""Describe a metric: sums over examples and a value that follows from them, or a value of all examples together.

Shapes: K clients, N examples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedlearn.core.segments import Counts, Segments
from fedlearn.errors import require

Sums = Mapping[str, np.ndarray | Counts]  # name -> values of each example, (N, ...)
BatchSums = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]  # (outputs, targets) -> summed values
SumsOf = Callable[[np.ndarray, np.ndarray], Sums]  # (outputs, targets) -> sums
Finish = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # name -> summed values (K, ...), to K values
Whole = Callable[[Segments, np.ndarray, np.ndarray], np.ndarray]  # (segments, outputs, targets) -> K values
NAME = re.compile(r"[A-Za-z][\w@%.-]{0,59}", re.ASCII)
COUNT = "count"  # sum that each metric has: the number of examples


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Compute a value from the outputs and the targets of held-out examples.

    A metric with ``sums`` and ``finish`` is exact for single clients, for all clients together, and for real nodes. A
    node sends the sums of its examples, and no output leaves it. A metric with ``whole`` needs all outputs in one
    place, e.g. an area under a curve. Its pooled value is NaN if the clients are at nodes.

    Args:
        name: name in tables, files and settings: letters, digits and ``_@%.-``.
        sums: ``(outputs, targets) -> {name: values}``, one row per example, vectorised. An array has the shape
            ``(N, ...)``, where the other axes do not depend on the examples. `Counts` replaces large arrays of 0 and 1.
        batch_sums: ``(outputs, targets) -> {name: sums}`` of all examples of one client, for a metric that cannot
            return values of single examples. It is called once per client, so it is slower than ``sums``.
        finish: ``{name: sums} -> value``. Each sum has leading axes of clients and the other axes of its values. The
            sum ``count`` is the number of examples. The function must broadcast over the leading axes.
        whole: ``(segments, outputs, targets) -> values``, one value per segment. A metric with all three functions uses
            ``whole`` where the outputs are in one place, because it is more precise.
        higher_is_better: False for losses and errors; default True.
        in_target_unit: True for an error in the unit of a scaled regression target; default False.
        client_floor: smallest value of a single client, for a metric without lower bound; lower values become this
            value. None (default) keeps all values.
        is_stratified: True if ``whole`` compares examples of one client only. The pooled value is then the mean over
            clients, weighted by their examples. Default False.

    Raises:
        SettingError: the name is not valid, or the functions are incomplete.

    >>> def correct(outputs, targets):
    ...     return {"correct": (outputs.argmax(axis=1) == targets).astype(float)}
    >>> accuracy = Metric(name="my_accuracy", sums=correct, finish=lambda sums: sums["correct"] / sums["count"])
    """

    name: str
    sums: SumsOf | None = None
    batch_sums: BatchSums | None = None
    finish: Finish | None = None
    whole: Whole | None = None
    higher_is_better: bool = True
    in_target_unit: bool = False
    client_floor: float | None = None
    is_stratified: bool = False

    @property
    def is_pooled_from_clients(self) -> bool:
        """True if the pooled value follows from the sums and values that nodes send."""
        return self.finish is not None or self.is_stratified

    def __post_init__(self) -> None:
        is_name = isinstance(self.name, str) and NAME.fullmatch(self.name) is not None
        require(is_name, "metric.name", self.name, "letters, digits and _@%.-, at most 60", 'Metric(name="ece", ...)')
        num_sums = (self.sums is not None) + (self.batch_sums is not None)
        is_complete = num_sums == (self.finish is not None) and bool(num_sums or self.whole)
        expected = "finish with sums or with batch_sums, or whole"
        require(is_complete, f"metric {self.name}", "incomplete", expected, "Metric(name=..., sums=..., finish=...)")


def mean_metric(
    name: str,
    values: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    higher_is_better: bool = True,
    in_target_unit: bool = False,
) -> Metric:
    """Return a metric that is the mean of a value of each example.

    Args:
        name: see `Metric`.
        values: ``(outputs, targets) -> values``, ``(N,)``.
        higher_is_better: see `Metric`.
        in_target_unit: see `Metric`.

    >>> import numpy as np
    >>> error = mean_metric("error", lambda outputs, targets: abs(outputs[:, 0] - targets), higher_is_better=False)
    >>> error.sums(np.array([[1.0], [2.0]]), np.array([1.0, 4.0]))
    {'error': array([0., 2.])}
    """

    def sums(outputs: np.ndarray, targets: np.ndarray) -> Sums:
        return {name: values(outputs, targets)}

    def finish(totals: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(totals[name] / totals[COUNT])

    return Metric(name=name, sums=sums, finish=finish, higher_is_better=higher_is_better, in_target_unit=in_target_unit)


def divide_sums(totals: Mapping[str, np.ndarray], name: str, count: str) -> np.ndarray:
    """Return a sum divided by a sum of counts, by their names; NaN where the count is zero."""
    return np.where(totals[count] > 0, totals[name] / np.maximum(totals[count], 1), np.nan)
