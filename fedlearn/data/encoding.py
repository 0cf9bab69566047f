"""Choose the encoding of columns, from declared scales and categories or from federated statistics.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedlearn.advice import assignment
from fedlearn.data.cell_formats import PLAIN, TEXT, CellFormat, TextFormat
from fedlearn.data.column_types import Category, Column, Number, numeric_column
from fedlearn.data.federated_statistics import Statistics
from fedlearn.data.levels import PLAIN_NUMBER, level_numbers, to_categories, to_category
from fedlearn.data.tables import Table
from fedlearn.errors import DataError, SettingError

MAX_CATEGORIES = 50
Format = CellFormat | TextFormat
NO_FORMATS: Mapping[str, Format] = {}
MAX_INFERRED_CLASSES = 20  # a column of whole numbers with more distinct values is a regression target


def declared_encoding(
    table: Table, scales: Mapping[str, Sequence[float]], categories: Mapping[str, Sequence[object]]
) -> tuple[Column, ...]:
    """Return the columns that the settings declare, after a check against the columns of the table.

    Args:
        table: the rows to encode; the order of its columns has no effect.
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
            fix = "scale=federated"
            raise SettingError("scales", dict(scales) or None, expected, fix)
    return columns_by_name(pair_of, declared, table.formats)


def declared_columns(
    scales: Mapping[str, Sequence[float]],
    categories: Mapping[str, Sequence[object]],
    formats: Mapping[str, Format] = NO_FORMATS,
) -> tuple[Column, ...]:
    """Return the columns of settings alone, without data. A coordinator knows them although the rows are at the nodes.

    Args:
        scales: (centre, spread) of each numeric column.
        categories: values of each column of categories.
        formats: formats of cells that a schema states.

    Raises:
        SettingError: a scale is not a pair of numbers.
    """
    pair_of = {name: _pair(name, scale) for name, scale in scales.items() if name not in categories}
    levels = {name: tuple(map(to_category, values)) for name, values in categories.items()}
    return columns_by_name(pair_of, levels, formats)


def columns_by_name(
    scales: Mapping[str, tuple[float, float]],
    categories: Mapping[str, tuple[str, ...]],
    formats: Mapping[str, Format] = NO_FORMATS,
) -> tuple[Column, ...]:
    """Return the columns sorted by name, so that the files of all nodes give the same order of features."""
    return tuple(encoded_columns(sorted({*scales, *categories}), scales, categories, formats).values())


def encoded_columns(
    names: Iterable[str],
    scales: Mapping[str, tuple[float, float]],
    categories: Mapping[str, tuple[str, ...]],
    formats: Mapping[str, Format] = NO_FORMATS,
) -> dict[str, Column]:
    """Return each column with its categories or its scale; the centre replaces a missing number."""
    columns: dict[str, Column] = {}
    for name in names:
        if name in categories:
            columns[name] = _category(name, categories[name], formats)
        else:
            centre, spread = scales[name]
            format = number_format(name, formats)
            columns[name] = Number(name=name, centre=centre, spread=spread, fill=centre, format=format)
    return columns


def number_format(name: str, formats: Mapping[str, Format]) -> CellFormat:
    """Return the format of a column of numbers or dates."""
    format = formats.get(name, PLAIN)
    return PLAIN if isinstance(format, TextFormat) else format


def _category(name: str, levels: tuple[str, ...], formats: Mapping[str, Format]) -> Category:
    format = formats.get(name, TEXT)
    return Category(name=name, levels=levels, format=format if isinstance(format, TextFormat) else TEXT)


def identity_encoding(table: Table, categories: Mapping[str, Sequence[object]]) -> tuple[Column, ...]:
    """Return columns that leave numbers unchanged.

    Raises:
        DataError: a number is missing, because this encoding has no value to fill in.
    """
    declared = known_categories(table, categories)
    numeric = [name for name in table.columns if name not in declared]
    for name in numeric:
        fix = "scenario.scale=federated"
        table.refuse(np.isnan(numeric_column(table, name)), name, "missing", fix)
    return tuple(
        _category(name, declared[name], table.formats)
        if name in declared
        else Number(name=name, format=number_format(name, table.formats))
        for name in sorted(table.columns)
    )


def encoding_from_statistics(
    table: Table, statistics: Statistics, categories: Mapping[str, Sequence[object]]
) -> tuple[Column, ...]:
    """Return the columns with the means, standard deviations and counted categories of federated statistics.

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
    return tuple(encoded_columns(table.columns, scales, encoded, table.formats).values())


def known_categories(table: Table, categories: Mapping[str, Sequence[object]]) -> Mapping[str, tuple[str, ...]]:
    """Return the declared categories in the canonical form of `to_category`.

    Raises:
        DataError: the table has no such column.
    """
    for name in categories:
        table.column(name, f"scenario.categories.{name}")
    return {name: tuple(map(to_category, values)) for name, values in categories.items()}


def encode_targets(
    table: Table, name: str, *, task: str | None, classes: Sequence[object] | None, has_all_clients: bool
) -> tuple[np.ndarray, str, tuple[str, ...]]:
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
    declared = None if classes is None else tuple(map(to_category, classes))
    cells_N = to_categories(table.column(name, "scenario.target"), declared or ())
    missing_N = np.array([cell is None for cell in cells_N])
    fix = "a value in this cell, or 'scenario.classes=[...]' with all classes, if the text of the cell is a class"
    table.refuse(missing_N, name, "missing, but it is the target", fix)
    is_regression = task is None and classes is None and has_all_clients and _has_real_values(table.columns[name])
    if task == "regression" or is_regression:
        return numeric_column(table, name), "regression", ()
    all_classes = _classes(cells_N, task, has_all_clients) if declared is None else declared
    if len(set(all_classes)) < max(2, len(all_classes)):
        raise SettingError("classes", list(all_classes), "two or more classes, each once", "target=ANOTHER_COLUMN")
    y_N = level_numbers(table.columns[name], all_classes)
    table.refuse(
        y_N < 0, name, f"not one of the classes {', '.join(all_classes)}", "list all classes in scenario.classes"
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
        raise SettingError(f"scales.{name}", scale, expected, assignment("scenario.scales", {name: [50, 10]}))
    return centre, spread


def _counted_categories(table: Table, name: str, statistics: Statistics) -> tuple[str, ...]:
    values = tuple(statistics[name].counts)
    if len(values) > MAX_CATEGORIES:
        fix = assignment("scenario.ignore", [name])
        problem = f"column {name} has {len(values)} different values"
        expected = f"at most {MAX_CATEGORIES} for a column of categories; scenario.text names a column of text"
        raise DataError(f"{problem}\n  expected  {expected}\n  try       {fix}")
    return values


def _has_real_values(cells_N: np.ndarray) -> bool:
    """Return whether a column has numbers that are no classes. Text, such as codes of digits, has none."""
    if cells_N.dtype == object:
        return False
    are_whole = bool((cells_N == np.rint(cells_N)).all())
    return not (are_whole and len(np.unique(cells_N)) <= MAX_INFERRED_CLASSES)


def _classes(cells_N: np.ndarray, task: str | None, has_all_clients: bool) -> tuple[str, ...]:
    present = set(cells_N)
    if task == "binary" and present <= {"0", "1"}:
        return ("0", "1")
    if not has_all_clients:
        expected = "all classes in order, or scenario.task=regression, because this folder lacks some clients"
        raise SettingError("classes", None, expected, "'scenario.classes=[0,1]'")
    by_spelling = {" ".join(cell.lower().split()): cell for cell in sorted(present)}
    if len(by_spelling) < len(present):
        expected = "classes that differ in more than upper case and spaces; the files spell one class in two ways"
        raise SettingError(
            "classes", sorted(present), expected, "'scenario.classes=[...]', and one spelling in all files"
        )
    if all(map(PLAIN_NUMBER.fullmatch, present)):
        return tuple(sorted(present, key=float))
    return tuple(sorted(present))
