"""Encode columns as numbers, with declared scales and categories or with federated statistics.

Shapes: N rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlearn.core.federated_data import Task
from fedlearn.data.federated_statistics import Statistics
from fedlearn.data.tables import Table, read_table, to_categories, to_category, to_numbers
from fedlearn.errors import DataError, SettingError

MAX_CATEGORIES = 50
MAX_INFERRED_CLASSES = 20  # a column of whole numbers with more distinct values is a regression target


@dataclass(frozen=True, kw_only=True)
class ColumnEncoding:
    """Encode the columns of a table as numeric features.

    Args:
        scales: (centre, spread) of each numeric column; a missing value becomes the centre, which is 0 after scaling.
        categories: values of each other column, one feature for each; a missing value is 0 in all of them.
        strict: whether an unknown category is an error; if not, it counts as missing.
    """

    scales: Mapping[str, tuple[float, float]]
    categories: Mapping[str, tuple[str, ...]]
    strict: bool = True

    def features(self, table: Table) -> np.ndarray:
        """Return the features ``(N, F)`` float32, with the columns in the order of the table.

        Raises:
            DataError: a cell is neither missing nor valid for its column; the message names file, row and column.
        """
        parts = [
            self._one_hot(table, name) if name in self.categories else self._scaled(table, name)
            for name in table.columns
        ]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _scaled(self, table: Table, name: str) -> np.ndarray:
        centre, spread = self.scales[name]
        scaled_N = (numeric_column(table, name) - centre) / spread
        return np.where(np.isnan(scaled_N), 0, scaled_N)[:, None]

    def _one_hot(self, table: Table, name: str) -> np.ndarray:
        categories_N, categories = to_categories(table.columns[name]), self.categories[name]
        one_hot_NC = categories_N[:, None] == np.array(categories, object)
        unknown_N = ~one_hot_NC.any(axis=1) & np.array([cell is not None for cell in categories_N])
        if self.strict:
            fix = f"'scenario.categories={{{name}:[...]}}' with all values"
            table.refuse(unknown_N, name, f"not one of the categories {', '.join(categories)}", fix)
        return one_hot_NC


def numeric_column(table: Table, name: str) -> np.ndarray:
    """Return a numeric column as float64, with NaN for missing values.

    Raises:
        DataError: a cell is not a number; the message names file, row and column of the first one.
    """
    values_N, invalid_N = to_numbers(table.columns[name])
    fix = f"correcting the cell, or 'scenario.categories={{{name}:[...]}}' for a column of categories"
    table.refuse(invalid_N, name, "not a number", fix)
    return values_N


def read_numeric_columns(file: Path, names: Sequence[str]) -> np.ndarray:
    """Return columns of a file as ``(N, F)`` float64, in the order of ``names``, with NaN for empty cells.

    Raises:
        DataError: a column is missing, or a cell is not a number; the message names file, row and column.
    """
    table = read_table(file)
    for name in names:
        if name not in table.columns:
            expected = f"{', '.join(names)}, in any order"
            raise DataError(f"{file.name} has no column {name}\n  expected  {expected}\n  try       adding the column")
    return np.stack([numeric_column(table, name) for name in names], axis=1)


def declared_encoding(
    table: Table, scales: Mapping[str, Sequence[float]], categories: Mapping[str, Sequence[object]]
) -> ColumnEncoding:
    """Return the encoding that the settings declare, after a check against the columns.

    Args:
        table: the rows to encode.
        scales: (centre, spread) of each numeric column, spread > 0.
        categories: values of each column of categories.

    Raises:
        SettingError: a column has neither scale nor categories, or a scale is not a pair of numbers.
    """
    declared = known_categories(table, categories)
    pair_of = {name: _pair(name, scales[name]) for name in table.columns if name in scales}
    for name in table.columns:
        if name not in declared and name not in pair_of:
            expected = f"a centre and a spread for each numeric column, or its categories; column {name} has neither"
            fix = f"'scenario.scales={{{name}:[CENTRE,SPREAD]}}', or scenario.scale=federated in a simulation"
            raise SettingError("scales", dict(scales) or None, expected, fix)
    return ColumnEncoding(scales=pair_of, categories=declared)


def identity_encoding(table: Table, categories: Mapping[str, Sequence[object]]) -> ColumnEncoding:
    """Return the encoding that leaves numbers unchanged.

    Raises:
        DataError: a number is missing, because this encoding has no value to fill in.
    """
    declared = known_categories(table, categories)
    numeric = [name for name in table.columns if name not in declared]
    for name in numeric:
        fix = "scenario.scale=federated or constants, which replace a missing value by the centre"
        table.refuse(np.isnan(numeric_column(table, name)), name, "missing", fix)
    return ColumnEncoding(scales=dict.fromkeys(numeric, (0.0, 1.0)), categories=declared)


def encoding_from_statistics(
    table: Table, statistics: Statistics, categories: Mapping[str, Sequence[object]]
) -> ColumnEncoding:
    """Return the encoding with the means, standard deviations and counted categories of federated statistics.

    Args:
        table: all rows, to name invalid cells.
        statistics: sums of each column, see `fedlearn.data.federated_statistics`.
        categories: declared categories, which take precedence.

    Raises:
        DataError: a numeric column has a cell that is not a number, or a text column has too many values.
    """
    encoded = dict(known_categories(table, categories))
    for name in table.columns:
        if name not in encoded and table.columns[name].dtype == object:
            encoded[name] = _counted_categories(table, name, statistics)
    numeric = [name for name in table.columns if name not in encoded]
    scales = {name: (statistics[name].mean, statistics[name].std) for name in numeric}
    return ColumnEncoding(scales=scales, categories=encoded, strict=False)


def known_categories(table: Table, categories: Mapping[str, Sequence[object]]) -> Mapping[str, tuple[str, ...]]:
    """Return the declared categories in the canonical form of `to_category`.

    Raises:
        DataError: the table has no such column.
    """
    for name in categories:
        table.column(name, f"scenario.categories.{name}")
    return {name: tuple(map(to_category, values)) for name, values in categories.items()}


def encode_targets(
    table: Table, name: str, *, task: Task | None, classes: Sequence[object] | None, has_all_clients: bool
) -> tuple[np.ndarray, Task, tuple[str, ...]]:
    """Return the targets, the task, and the classes (empty for a regression).

    Args:
        table: rows with the column of targets.
        name: name of this column.
        task: task of the model. None infers it: text and up to 20 whole numbers are classes, other numbers are real
            targets.
        classes: all classes, in the order of their numbers; None takes the classes in the table.
        has_all_clients: whether the table holds the rows of all clients; if not, ``classes`` is required.

    Returns:
        Class numbers or real targets ``(N,)``, the task, and the classes.

    Raises:
        DataError: a target is missing, or does not fit the task or the classes; the message names file and row.
        SettingError: ``classes`` is required but None, or has duplicates, or does not fit the task.
    """
    cells_N = to_categories(table.column(name, "scenario.target"))
    missing_N = np.array([cell is None for cell in cells_N])
    table.refuse(missing_N, name, "missing, but it is the target", "removing the row: training needs a target")
    is_regression = task is None and classes is None and has_all_clients and _has_real_values(table.columns[name])
    if task == "regression" or is_regression:
        return numeric_column(table, name), "regression", ()
    all_classes = tuple(map(to_category, classes)) if classes is not None else _classes(cells_N, task, has_all_clients)
    if len(set(all_classes)) < max(2, len(all_classes)):
        raise SettingError("classes", list(all_classes), "two or more classes, each once", "target=ANOTHER_COLUMN")
    number_of = {value: number for number, value in enumerate(all_classes)}
    y_N = np.array([number_of.get(cell, -1) for cell in cells_N], np.int64)
    table.refuse(
        y_N < 0, name, f"not one of the classes {', '.join(all_classes)}", "'scenario.classes=[...]' with all classes"
    )
    if task == "binary" and len(all_classes) != 2:
        raise SettingError("task", task, f"multiclass, because there are {len(all_classes)} classes", "task=multiclass")
    return y_N, task or ("binary" if len(all_classes) == 2 else "multiclass"), all_classes


def _pair(name: str, scale: Sequence[float]) -> tuple[float, float]:
    try:
        centre, spread = (float(number) for number in scale)
    except (TypeError, ValueError):
        centre, spread = 0.0, 0.0
    if not spread > 0:
        expected = "two numbers: the centre and a spread > 0"
        raise SettingError(f"scales.{name}", scale, expected, f"'scenario.scales={{{name}:[50,10]}}'")
    return centre, spread


def _counted_categories(table: Table, name: str, statistics: Statistics) -> tuple[str, ...]:
    _, invalid_N = to_numbers(table.columns[name])
    num_present = sum(cell is not None for cell in table.columns[name])
    if 2 * invalid_N.sum() < num_present:  # mostly numbers: the other cells are errors, not categories
        numeric_column(table, name)
    values = tuple(statistics[name].counts)
    if len(values) > MAX_CATEGORIES:
        fix = f"'scenario.ignore=[{name}]', or scenario.text={name} to use it as text"
        raise DataError(
            f"column {name} has {len(values)} different values\n"
            f"  expected  at most {MAX_CATEGORIES} for a column of categories\n  try       {fix}"
        )
    return values


def _has_real_values(cells_N: np.ndarray) -> bool:
    values_N, invalid_N = to_numbers(cells_N)
    are_whole = bool((values_N == np.rint(values_N)).all())
    return not invalid_N.any() and not (are_whole and len(np.unique(values_N)) <= MAX_INFERRED_CLASSES)


def _classes(cells_N: np.ndarray, task: Task | None, has_all_clients: bool) -> tuple[str, ...]:
    present = set(cells_N)
    if task == "binary" and present <= {"0", "1"}:
        return ("0", "1")
    if not has_all_clients:
        expected = "all classes in order, or scenario.task=regression, because this folder lacks some clients"
        raise SettingError("classes", None, expected, "'scenario.classes=[0,1]'")
    values_N, invalid_N = to_numbers(np.array([*present], object))
    if invalid_N.any():
        return tuple(sorted(present))
    return tuple(to_category(value) for value in np.sort(values_N))
