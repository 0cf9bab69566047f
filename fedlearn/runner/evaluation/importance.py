"""Permutation importance: the loss of quality if the values of an input column change places.

The features of a column are a function of its cells. Exchange of the cells of two rows therefore exchanges the
features of this column, and needs no raw data.

Shapes: N examples, F features.

Reference: Fisher, Rudin, Dominici, *All Models are Wrong, but Many are Useful*, JMLR 20, 2019, arXiv:1801.01489.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fedlearn.callbacks.run_history import finite_or_none
from fedlearn.core.metrics import higher_is_better
from fedlearn.core.tasks import Task
from fedlearn.data.inputs import TableInputs
from fedlearn.data.preprocessing import Preprocessing
from fedlearn.runner.evaluation.held_out import HeldOut
from fedlearn.runner.evaluation.scores import Scores
from fedlearn.runner.evaluation.task_scores import scores_of

MAX_COLUMNS, MAX_EXAMPLES, NUM_REPEATS = 50, 5_000, 5
MAX_PAIRED = 500  # examples, for a metric that compares all pairs of examples
MAX_VALUES = 50_000_000  # feature values that are predicted in total


def importance_entries(
    held_out: HeldOut, preprocessing: Preprocessing | None, task: Task, metric: str, rng: np.random.Generator
) -> dict[str, Any]:
    """Return the importance of each column, or the reason why it is missing.

    The value of a column is the mean loss of quality over the repeats. Loss of quality is the decrease of ``metric``,
    or its increase if a low value is better. Correlated columns have small values, because each replaces the other.

    Args:
        held_out: held-out examples.
        preprocessing: inputs of the model; None if unknown.
        task: task with its metrics.
        metric: metric of the quality.
        rng: random numbers of the permutations.
    """
    positions = column_positions(preprocessing)
    if reason := _reason_to_skip(held_out, positions):
        return {"missing": reason}
    assert preprocessing is not None
    sign = 1 if higher_is_better(metric, task.lower_is_better) else -1
    if len(held_out.x) > MAX_PAIRED and metric in scores_of(held_out, task, preprocessing.target).recompute:
        return {"missing": f"{metric} is too slow on more than {MAX_PAIRED:,} held-out examples"}
    quality = partial(
        _quality, held_out, metric=metric, sign=sign, scores=partial(scores_of, task=task, target=preprocessing.target)
    )
    reference = quality(held_out.x)
    if not math.isfinite(reference):
        return {"missing": f"{metric} is not defined on these examples"}
    columns: list[tuple[float, dict[str, Any]]] = []
    for name, places in positions.items():
        drops = [reference - quality(_permuted(held_out.x, places, rng)) for _ in range(NUM_REPEATS)]
        mean, std = float(np.mean(drops)), float(np.std(drops))
        rank = mean if math.isfinite(mean) else -math.inf
        columns.append((rank, {"name": name, "mean": finite_or_none(mean), "std": finite_or_none(std)}))
    ordered = [column for _, column in sorted(columns, key=lambda item: -item[0])]
    return {"metric": metric, "num_repeats": NUM_REPEATS, "columns": ordered}


def column_positions(preprocessing: Preprocessing | None) -> Mapping[str, np.ndarray]:
    """Return name of a column -> positions of its features; empty if the inputs are not a table."""
    if preprocessing is None or not isinstance(preprocessing.inputs, TableInputs):
        return {}
    positions: dict[str, list[int]] = {}
    start = 0
    for column in preprocessing.inputs.columns:
        positions.setdefault(column.name, []).extend(range(start, start + column.num_features))
        start += column.num_features
    return {name: np.array(places) for name, places in positions.items()}


def _reason_to_skip(held_out: HeldOut, positions: Mapping[str, np.ndarray]) -> str:
    num_features = sum(map(len, positions.values()))
    if not positions:
        return "the inputs are not columns of a table"
    if len(positions) == 1:
        return "the table has one column only"
    if held_out.x.ndim < 2 or held_out.x[0].size != num_features:
        return "the model inputs are not the features of the columns"
    if len(positions) > MAX_COLUMNS:
        return f"the table has {len(positions)} columns, and the limit is {MAX_COLUMNS}"
    if len(held_out.x) > MAX_EXAMPLES:
        return f"there are {len(held_out.x):,} held-out examples, and the limit is {MAX_EXAMPLES:,}"
    if len(positions) * NUM_REPEATS * held_out.x.size > MAX_VALUES:
        return "the inputs are too large for repeated predictions"
    return ""


def _permuted(x: np.ndarray, places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the inputs with the features of a column in another order of the examples."""
    x_NF = x.reshape(len(x), -1).copy()
    x_NF[:, places] = x_NF[rng.permutation(len(x))][:, places]
    return x_NF.reshape(x.shape)


def _quality(held_out: HeldOut, x: np.ndarray, scores: Callable[[HeldOut], Scores], metric: str, sign: int) -> float:
    """Return the metric of these inputs, times the sign; NaN if it is not computed."""
    outputs = np.asarray(held_out.predict(x), np.float64)
    return sign * scores(replace(held_out, outputs_NC=outputs)).values.get(metric, math.nan)
