"""Judge the groups of held-out examples that a column defines.

Shapes: N examples, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fedlearn.advice import assignment
from fedlearn.core.intervals import bootstrap_of
from fedlearn.data.column_types import Category, Number
from fedlearn.data.inputs import TableInputs
from fedlearn.data.tables import to_categories, to_numbers
from fedlearn.errors import SettingError
from fedlearn.loop.scenario import Scenario
from fedlearn.runner.evaluation.held_out import HeldOut
from fedlearn.runner.evaluation.importance import column_positions
from fedlearn.runner.evaluation.scores import estimates
from fedlearn.runner.evaluation.task_scores import scores_of

MIN_EXAMPLES = 10  # a smaller group can reveal single persons, and its metric says little
MAX_GROUPS = 12
NUM_RANGES = 4
MISSING = "missing"


def require_subgroups(scenario: Scenario, names: Sequence[str]) -> None:
    """Check the setting ``subgroups`` before the first round.

    Raises:
        SettingError: a name is not a column of the scenario.
        DataError: a column cannot be read.
    """
    known = available_columns(scenario)
    for name in names:
        if name not in known:
            expected = f"columns of the scenario: {', '.join(known)}" if known else "null: the inputs are not a table"
            fix = assignment("subgroups", [known[0]]) if known else "subgroups=null"
            raise SettingError("subgroups", name, expected, fix)
        if scenario.held_out_columns is not None:
            scenario.held_out_columns.read(name)  # an unreadable column is an error now, not after the last round


def available_columns(scenario: Scenario) -> tuple[str, ...]:
    """Return the names of the columns that can define groups."""
    if scenario.held_out_columns is not None:
        return scenario.held_out_columns.names
    inputs = scenario.preprocessing.inputs if scenario.preprocessing else None
    if not isinstance(inputs, TableInputs) or scenario.data.num_train is not None:
        return ()
    return tuple(dict.fromkeys(column.name for column in inputs.columns if isinstance(column, Number | Category)))


def subgroup_entries(
    held_out: HeldOut, scenario: Scenario, names: Sequence[str], metric: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Return the metric in each group of each column. Groups of fewer than ten examples have no value.

    Args:
        held_out: held-out examples.
        scenario: scenario with its preprocessing.
        names: columns; a column of numbers with many values is divided into four ranges.
        metric: metric of the groups.
        rng: random numbers of the intervals.
    """
    entries = []
    for name in names:
        index_N, labels = divide(_cells(held_out, scenario, name))
        groups = [
            {"name": label} | _group(held_out, scenario, index_N == number, metric, rng)
            for number, label in enumerate(labels)
        ]
        entries.append({"column": name, "metric": metric, "groups": groups})
    return entries


def divide(cell_N: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the group of each example, and the names of the groups.

    Numbers with more than 12 values are divided into four ranges with about equally many examples. In other columns,
    the 12 most frequent values are groups, and one more group has the rest.

    >>> index_N, labels = divide(np.array(["f", "m", None, "f"], object))
    >>> index_N.tolist(), labels
    ([0, 1, 2, 0], ['f', 'm', 'missing'])
    """
    number_N, wrong_N = to_numbers(cell_N)
    is_number = not wrong_N.any() and np.isfinite(number_N).any()
    if is_number and len(np.unique(number_N[np.isfinite(number_N)])) > MAX_GROUPS:
        return _ranges(number_N)
    names_N = np.array([MISSING if cell is None else cell for cell in to_categories(cell_N)], object)
    names, count = np.unique(names_N.astype(str), return_counts=True)
    frequent = set(names[np.argsort(-count, kind="stable")][:MAX_GROUPS].tolist())
    kept = sorted(frequent - {MISSING}, key=lambda name: (float(name) if is_number else 0.0, name))
    labels = [*kept, *([MISSING] if MISSING in frequent else []), *(["other"] if len(names) > len(frequent) else [])]
    return np.array([labels.index(name) if name in frequent else len(labels) - 1 for name in names_N]), labels


def _ranges(number_N: np.ndarray) -> tuple[np.ndarray, list[str]]:
    is_missing_N = ~np.isfinite(number_N)
    shares = np.linspace(0, 1, NUM_RANGES + 1)[1:-1]
    edges = np.unique(np.quantile(number_N[~is_missing_N], shares))
    index_N = np.where(is_missing_N, len(edges) + 1, np.searchsorted(edges, number_N))
    texts = [f"{edge:.4g}" for edge in edges]
    labels = [f"up to {texts[0]}", *(f"{low} to {high}" for low, high in pairwise(texts)), f"above {texts[-1]}"]
    return index_N, [*labels, MISSING] if is_missing_N.any() else labels


def _group(
    held_out: HeldOut, scenario: Scenario, chosen_N: np.ndarray, metric: str, rng: np.random.Generator
) -> dict[str, Any]:
    count = int(chosen_N.sum())
    if count < MIN_EXAMPLES:
        return {"num_examples": None, "suppressed": True}
    part = held_out.subset(chosen_N)
    assert scenario.preprocessing is not None
    scores = scores_of(part, scenario.data.task, scenario.preprocessing.target)
    estimate = estimates(scores, bootstrap_of(part.client_N), rng).get(metric, {})
    return {"num_examples": count, "suppressed": False, **estimate}


def _cells(held_out: HeldOut, scenario: Scenario, name: str) -> np.ndarray:
    """Return the cells of a column: of the raw rows, or computed back from the model inputs."""
    if scenario.held_out_columns is not None:
        cells = scenario.held_out_columns.read(name)
        return np.concatenate([cells[client] for client in held_out.clients])
    assert scenario.preprocessing is not None
    assert isinstance(scenario.preprocessing.inputs, TableInputs)
    columns = [column for column in scenario.preprocessing.inputs.columns if column.name == name]
    x_NF = held_out.x.reshape(len(held_out.x), -1)[:, column_positions(scenario.preprocessing)[name]]
    column = columns[0]
    if isinstance(column, Category):
        return _levels(x_NF, column.levels)
    assert isinstance(column, Number)
    if column.equals is not None:
        return _levels(x_NF, [f"{each.equals:g}" for each in columns if isinstance(each, Number)])
    return _numbers(x_NF[:, 0], column)


def _levels(x_NF: np.ndarray, levels: Sequence[str]) -> np.ndarray:
    """Return the level of each example. An example without an active feature has no level."""
    is_active_NF = x_NF > (x_NF.min(axis=0) + x_NF.max(axis=0)) / 2
    return np.array([levels[row.argmax()] if row.any() else None for row in is_active_NF], object)


def _numbers(x_N: np.ndarray, column: Number) -> np.ndarray:
    linear_N = np.asarray(x_N, np.float64)
    if column.scaling == "arcsinh":
        linear_N = np.sinh(linear_N)
    value_N = column.centre + column.spread * linear_N
    value_N = np.expm1(value_N) if column.scaling == "log1p" else value_N
    return np.array([float(f"{value:.6g}") for value in value_N])  # float32 inputs have seven digits
