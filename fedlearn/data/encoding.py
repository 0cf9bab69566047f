"""From columns to numbers: scales and categories that were declared, or found by a federated statistics round.

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
MAX_INFERRED_CLASSES = 20  # whole numbers with more values than this are taken for a quantity


@dataclass(frozen=True, kw_only=True)
class ColumnEncoding:
    """What stands for what.

    Args:
        scales: (centre, spread) of each numeric column; a missing value is put at the centre, which becomes 0.
        categories: values of each other column, one feature for each; a missing value is 0 in all of them.
        strict: whether a category that is not among these is an error, or counts as missing.
    """

    scales: Mapping[str, tuple[float, float]]
    categories: Mapping[str, tuple[str, ...]]
    strict: bool = True

    def features(self, table: Table) -> np.ndarray:
        """``(N, F)`` float32, columns in the order of the table.

        Raises:
            DataError: a cell is neither missing nor what its column should hold; names file, row and column.
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
        cells_N, known = to_categories(table.columns[name]), self.categories[name]
        hot = cells_N[:, None] == np.array(known, object)
        strange_N = ~hot.any(axis=1) & np.array([cell is not None for cell in cells_N])
        if self.strict:
            fix = f"'scenario.categories={{{name}:[...]}}' with all that there are"
            table.refuse(strange_N, name, f"not one of the categories {', '.join(known)}", fix)
        return hot


def numeric_column(table: Table, name: str) -> np.ndarray:
    """A column that must hold numbers, NaN where they are missing; `DataError` names the first cell that does not."""
    values_N, wrong_N = to_numbers(table.columns[name])
    fix = f"correcting the cell, or 'scenario.categories={{{name}:[...]}}' if the column holds categories"
    table.refuse(wrong_N, name, "not a number", fix)
    return values_N


def read_numeric_columns(file: Path, names: Sequence[str]) -> np.ndarray:
    """Some columns of a file, ``(N, F)`` float64 in the order of ``names``, NaN where a cell is empty.

    Raises:
        DataError: a column is absent, or a cell holds no number; names file, row and column.
    """
    table = read_table(file)
    for name in names:
        if name not in table.columns:
            raise DataError(f"{file.name} has no column {name}\n  expected  {', '.join(names)}, in any order")
    return np.stack([numeric_column(table, name) for name in names], axis=1)


def declared_encoding(
    table: Table, scales: Mapping[str, Sequence[float]], categories: Mapping[str, Sequence[object]]
) -> ColumnEncoding:
    """The encoding that settings state, checked against the columns.

    Raises:
        SettingError: a column has neither scale nor categories, or a scale is no pair of numbers.
    """
    known = known_categories(table, categories)
    pairs = {name: _pair(name, scales[name]) for name in table.columns if name in scales}
    for name in table.columns:
        if name not in known and name not in pairs:
            expected = f"a centre and a spread for each column of numbers, or its categories: {name} has neither"
            fix = f"'scenario.scales={{{name}:[CENTRE,SPREAD]}}', or scenario.scale=federated in a simulation"
            raise SettingError("scales", dict(scales) or None, expected, fix)
    return ColumnEncoding(scales=pairs, categories=known)


def identity_encoding(table: Table, categories: Mapping[str, Sequence[object]]) -> ColumnEncoding:
    """Numbers unchanged; `DataError` where one is missing, for which there is no value to put."""
    known = known_categories(table, categories)
    plain = [name for name in table.columns if name not in known]
    for name in plain:
        fix = "scenario.scale=federated or constants: a missing value is then put at the centre"
        table.refuse(np.isnan(numeric_column(table, name)), name, "missing", fix)
    return ColumnEncoding(scales=dict.fromkeys(plain, (0.0, 1.0)), categories=known)


def encoding_from_statistics(
    table: Table, statistics: Statistics, categories: Mapping[str, Sequence[object]]
) -> ColumnEncoding:
    """The encoding that follows from statistics: means and standard deviations, and the categories that were counted.

    Args:
        table: all rows, to name cells that do not fit.
        statistics: by column, see `fedlearn.data.federated_statistics`.
        categories: declared ones, which come first.

    Raises:
        DataError: a column of numbers holds a cell that is none, or one of text has too many values for categories.
    """
    known = dict(known_categories(table, categories))
    for name in table.columns:
        if name not in known and table.columns[name].dtype == object:
            known[name] = _found_categories(table, name, statistics)
    plain = [name for name in table.columns if name not in known]
    scales = {name: (statistics[name].mean, statistics[name].std) for name in plain}
    return ColumnEncoding(scales=scales, categories=known, strict=False)


def known_categories(table: Table, categories: Mapping[str, Sequence[object]]) -> Mapping[str, tuple[str, ...]]:
    """Declared categories in the form in which they are compared; `DataError` for a column that is not there."""
    for name in categories:
        table.column(name, f"scenario.categories.{name}")
    return {name: tuple(map(to_category, values)) for name, values in categories.items()}


def encode_targets(
    table: Table, name: str, *, task: Task | None, classes: Sequence[object] | None, has_all_clients: bool
) -> tuple[np.ndarray, Task, tuple[str, ...]]:
    """What is to be predicted: class numbers or real targets, the task, and the classes ((): a regression).

    Args:
        table: with the column.
        name: of the column.
        task: None infers it: text and up to 20 whole numbers are classes, other numbers a quantity.
        classes: all there are, in the order of their numbers; None takes those in the table.
        has_all_clients: whether the table holds all clients' rows; if not, classes must be said.

    Raises:
        DataError: a target is missing, or not what the task or the classes allow; names file and row.
        SettingError: the classes must be said.
    """
    cells_N = to_categories(table.column(name, "scenario.target"))
    missing_N = np.array([cell is None for cell in cells_N])
    table.refuse(missing_N, name, "missing, but it is the target", "removing the row: nothing can be learned from it")
    quantity = task is None and classes is None and has_all_clients and _is_quantity(table.columns[name])
    if task == "regression" or quantity:
        return numeric_column(table, name), "regression", ()
    known = tuple(map(to_category, classes)) if classes is not None else _classes(cells_N, task, has_all_clients)
    if len(set(known)) < max(2, len(known)):
        raise SettingError("classes", list(known), "two or more, each once", "target=ANOTHER_COLUMN")
    number_of = {value: number for number, value in enumerate(known)}
    y_N = np.array([number_of.get(cell, -1) for cell in cells_N], np.int64)
    table.refuse(y_N < 0, name, f"not one of the classes {', '.join(known)}", "'scenario.classes=[...]' with all")
    if task == "binary" and len(known) != 2:
        raise SettingError("task", task, f"multiclass: there are {len(known)} classes", "task=multiclass")
    return y_N, task or ("binary" if len(known) == 2 else "multiclass"), known


def _pair(name: str, scale: Sequence[float]) -> tuple[float, float]:
    try:
        centre, spread = (float(number) for number in scale)
    except (TypeError, ValueError):
        centre, spread = 0.0, 0.0
    if not spread > 0:
        expected = "two numbers, the centre and the spread, which is > 0"
        raise SettingError(f"scales.{name}", scale, expected, f"'scenario.scales={{{name}:[50,10]}}'")
    return centre, spread


def _found_categories(table: Table, name: str, statistics: Statistics) -> tuple[str, ...]:
    _, wrong_N = to_numbers(table.columns[name])
    present = sum(cell is not None for cell in table.columns[name])
    if 2 * wrong_N.sum() < present:  # mostly numbers: the others are slips, no categories
        numeric_column(table, name)
    values = tuple(statistics[name].counts)
    if len(values) > MAX_CATEGORIES:
        expected = f"has {len(values)} different values, at most {MAX_CATEGORIES} are taken for categories"
        fix = f"'scenario.ignore=[{name}]', or scenario.text={name} to learn from its words"
        raise DataError(f"column {name} {expected}\n  try       {fix}")
    return values


def _is_quantity(cells_N: np.ndarray) -> bool:
    values_N, wrong_N = to_numbers(cells_N)
    whole = bool((values_N == np.rint(values_N)).all())
    return not wrong_N.any() and not (whole and len(np.unique(values_N)) <= MAX_INFERRED_CLASSES)


def _classes(cells_N: np.ndarray, task: Task | None, whole: bool) -> tuple[str, ...]:
    here = set(cells_N)
    if task == "binary" and here <= {"0", "1"}:
        return ("0", "1")
    if not whole:
        expected = "all classes in order, or scenario.task=regression: not all clients are here to tell"
        raise SettingError("classes", None, expected, "'scenario.classes=[0,1]'")
    values_N, wrong_N = to_numbers(np.array([*here], object))
    if wrong_N.any():
        return tuple(sorted(here))
    return tuple(to_category(value) for value in np.sort(values_N))
