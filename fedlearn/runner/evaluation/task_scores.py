"""Metrics of any task with confidence intervals, from the sums that each metric of the task defines.

Shapes: N examples, M sums, R replicates, K clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial

import numpy as np

from fedlearn.core.intervals import MIN_CLIENTS
from fedlearn.core.metric import COUNT, Metric
from fedlearn.core.segments import Counts, Segments
from fedlearn.core.tasks import Task
from fedlearn.data.preprocessing import Target
from fedlearn.runner.evaluation.held_out import HeldOut
from fedlearn.runner.evaluation.scores import MAX_CELLS, Recompute, Scores, classification_scores, regression_scores

Slices = Mapping[str, tuple[slice, tuple[int, ...]]]  # name of a sum -> its columns, and its shape


def scores_of(held_out: HeldOut, task: Task, target: Target) -> Scores:
    """Return the scores of a task. A classification and a regression have more metrics than the task defines."""
    if task.is_classification:
        known = classification_scores(held_out, target)
    elif task.name == "regression":
        known = regression_scores(held_out, target)
    else:
        return task_scores(held_out, task, spread=target.spread)
    others = task_scores(held_out, task, omitted=known.values, spread=target.spread)
    return known.joined(others)


def task_scores(held_out: HeldOut, task: Task, *, omitted: Collection[str] = (), spread: float = 1.0) -> Scores:
    """Return the scores of the metrics of a task. A metric that needs all outputs has an interval for few examples.

    Args:
        held_out: held-out examples.
        task: task with its metrics.
        omitted: names of the metrics to leave out.
        spread: factor of the metrics in the unit of the target.
    """
    value_NM, finish_of = np.ones((len(held_out.targets_N), 1)), dict[str, Callable[..., np.ndarray]]()
    fixed, recompute = dict[str, float](), dict[str, Recompute]()
    has_many_clients = int(held_out.client_N[-1]) + 1 >= MIN_CLIENTS
    for metric in (each for each in task.metrics if each.name not in omitted):
        factor = abs(spread) if metric.in_target_unit else 1.0
        if metric.whole is not None and (task.averages_lists or metric.is_stratified):
            part_NM, finish = _means_over_clients(held_out, metric)
            if not has_many_clients:  # draws within a client do not change the value of the client
                totals = np.append(1.0, part_NM.sum(axis=0))[None]
                fixed[metric.name] = float(factor * finish(totals[:, 1:], totals[:, 0])[0])
                continue
        elif (sums := _sums(held_out, metric)) is not None:
            part_NM, finish = sums
        else:
            recompute[metric.name] = partial(_value, held_out, metric, factor)
            continue
        finish_of[metric.name] = _scaled(finish, slice(value_NM.shape[1], value_NM.shape[1] + part_NM.shape[1]), factor)
        value_NM = np.concatenate([value_NM, part_NM], axis=1)
    return Scores(
        value_NM=value_NM,
        finish=lambda sum_RM: {name: finish(sum_RM) for name, finish in finish_of.items()},
        fixed=fixed,
        recompute=recompute,
    )


def _scaled(finish: Callable[..., np.ndarray], columns: slice, factor: float) -> Callable[..., np.ndarray]:
    return lambda sum_RM: factor * finish(sum_RM[:, columns], sum_RM[:, 0])


def _sums(held_out: HeldOut, metric: Metric) -> tuple[np.ndarray, Callable[..., np.ndarray]] | None:
    """Return the sums of each example as columns, and the function from their totals to values; None without sums."""
    if metric.sums is None or metric.finish is None:
        return None
    parts: list[np.ndarray] = []
    slices: dict[str, tuple[slice, tuple[int, ...]]] = {}
    width = 0
    for name, values in metric.sums(held_out.outputs_NC, held_out.targets_N).items():
        dense = _dense(values) if isinstance(values, Counts) else np.asarray(values, np.float64)
        if dense is None:
            return None
        flat_NM = dense.reshape(len(dense), -1)
        slices[name] = slice(width, width + flat_NM.shape[1]), dense.shape[1:]
        width += flat_NM.shape[1]
        parts.append(flat_NM)
    if width * len(held_out.targets_N) > MAX_CELLS:
        return None
    return np.concatenate(parts, axis=1), _finish(metric, slices)


def _finish(metric: Metric, slices: Slices) -> Callable[..., np.ndarray]:
    assert metric.finish is not None
    function = metric.finish

    def finish(sum_RM: np.ndarray, count_R: np.ndarray) -> np.ndarray:
        totals = {name: sum_RM[:, columns].reshape(-1, *shape) for name, (columns, shape) in slices.items()}
        with np.errstate(all="ignore"):
            return np.asarray(function({**totals, COUNT: count_R}), np.float64)

    return finish


def _dense(counts: Counts) -> np.ndarray | None:
    """Return the counts as a table per example; None if the tables are too large."""
    size = math.prod(counts.shape)
    if size * len(counts) > MAX_CELLS:
        return None
    cells = counts.cells.reshape(len(counts), -1)
    dense = np.zeros((len(counts), size))
    rows, columns = np.nonzero(cells >= 0)
    np.add.at(dense, (rows, cells[rows, columns]), 1.0)
    return dense.reshape(-1, *counts.shape)


def _value(held_out: HeldOut, metric: Metric, factor: float, rows: np.ndarray) -> float:
    """Return the value of a metric on these examples together; a position may occur several times."""
    segments, outputs, targets = Segments(np.array([len(rows)])), held_out.outputs_NC[rows], held_out.targets_N[rows]
    with np.errstate(all="ignore"):
        if metric.whole is not None:
            return factor * float(metric.whole(segments, outputs, targets)[0])
        assert metric.sums is not None
        assert metric.finish is not None
        totals = {name: segments.sum(values) for name, values in metric.sums(outputs, targets).items()}
        return factor * float(metric.finish({**totals, COUNT: segments.sizes_K})[0])


def _means_over_clients(held_out: HeldOut, metric: Metric) -> tuple[np.ndarray, Callable[..., np.ndarray]]:
    """Return the value of each client, divided among its examples, and the function from totals to the mean.

    Lists count once each. A metric that compares examples of one client is weighted by the examples.
    """
    assert metric.whole is not None
    size_K = np.bincount(held_out.client_N)
    with np.errstate(all="ignore"):
        value_K = metric.whole(Segments(size_K), held_out.outputs_NC, held_out.targets_N)
    weight_K = np.isfinite(value_K) / (1 if metric.is_stratified else size_K)
    share_KM = np.stack([np.nan_to_num(value_K) * weight_K, weight_K], axis=1)

    def finish(sum_RM: np.ndarray, count_R: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.asarray(sum_RM[:, 0] / sum_RM[:, 1])

    return share_KM[held_out.client_N], finish
