"""Decide the type of each column of a table: numbers, dates, or text. A schema states it, or the cells show it.

A decision applies to a whole column over all files. Decisions that are no matter of course are notes of the table.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedlearn.data.cell_formats import LARGEST, PLAIN, CellFormat, DateFormat, NumberFormat, TextFormat, is_missing
from fedlearn.data.format_detection import NOT_A_NUMBER, Detection, detect_format, has_codes
from fedlearn.data.levels import UNKNOWN, level_numbers
from fedlearn.data.schema import ColumnSchema, TableSchema
from fedlearn.data.tables import Table, without_row_labels
from fedlearn.errors import DataError

MANY_LEVELS = 20  # levels of a column of text from which the header shows their number
SCHEMA_FIX = "a schema with this column: scenario.schema=FILE"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Hold the statements of the settings about the types of columns.

    Args:
        schema: schema of all columns; None detects the types.
        levels: declared values of columns of categories and classes, which stay text.
        texts: other columns that stay text, e.g. the names of clients.
        targets: columns to predict.
        used: further columns that a setting names, so that they are no row labels.
    """

    schema: TableSchema | None = None
    levels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    texts: Sequence[str] = ()
    targets: Sequence[str] = ()
    used: Sequence[str] = ()


DETECT = Reading()


def type_table(table: Table, reading: Reading = DETECT) -> Table:
    """Return a table with typed columns and without row labels.

    Args:
        table: columns as in the files.
        reading: schema, or declared columns.

    Raises:
        DataError: a column cannot be read as the settings and most of its cells say.
    """
    if reading.schema is not None:
        return apply_schema(without_row_labels(table, [*reading.schema.columns]), reading.schema)
    used = [*reading.levels, *reading.texts, *reading.targets, *reading.used]
    return type_columns(without_row_labels(table, used), reading)


def short_notes(table: Table, most: int = 4) -> tuple[str, ...]:
    """Return the first notes of a table, and the number of the others."""
    notes = tuple(dict.fromkeys(table.notes))
    return notes if len(notes) <= most else (*notes[:most], f"and {len(notes) - most} more notes in data inspect")


def type_columns(table: Table, reading: Reading = DETECT) -> Table:
    """Return a table whose columns of numbers and dates are float64 arrays, with notes of the decisions.

    Args:
        table: columns of text as in the files.
        reading: declared columns.

    Raises:
        DataError: the format of a column is ambiguous, or a cell differs from most cells of its column.
    """
    distinct = {name: _distinct(cells_N) for name, cells_N in table.columns.items() if cells_N.dtype == object}
    open_columns = {name: cells for name, cells in distinct.items() if name not in (*reading.levels, *reading.texts)}
    detections = {name: detect_format(cells) for name, cells in open_columns.items()}
    decimal = _decimal_mark(detections, open_columns)
    columns, notes = dict(table.columns), list(table.notes)
    formats: dict[str, CellFormat | TextFormat] = {}
    for name, detection in detections.items():
        if decimal == "," or (decimal is not None and detection.format is None):
            detection = detect_format(open_columns[name], decimal=decimal)
        format = _checked_format(table, name, detection, reading.targets)
        if format is not None:
            formats[name], (columns[name], _) = format, format.parse_column(table.columns[name])
            notes += [f"{name}: {note}" for note in _notes(format, open_columns[name])]
            notes += [f"{name}: {note}" for note in _point_notes(format, open_columns[name]) if decimal is None]
    notes += [f"{name}: all cells are missing" for name, cells in open_columns.items() if not cells]
    wide = {name: len(cells) for name, cells in open_columns.items() if name not in (*formats, *reading.targets)}
    notes += [f"{name}: text with {count} levels" for name, count in wide.items() if count > MANY_LEVELS]
    for name in distinct.keys() - formats.keys():
        columns[name] = _without_missing_words(columns[name], reading.levels.get(name, ()))
    typed = replace(table, columns=columns, formats=formats, notes=tuple(notes))
    refuse_large_numbers(typed)
    return typed


def apply_schema(table: Table, schema: TableSchema) -> Table:
    """Return a table with the types of a schema, without its ids and ignored columns.

    Raises:
        DataError: the table lacks a column, has another column, or has a cell that the schema excludes.
    """
    absent = [name for name in schema.columns if name not in table.columns and name not in schema.ignored]
    if absent:
        fix = f"{absent[0]}: {{type: ignore}} in the schema, if no site needs the column"
        raise DataError(f"{table.origins[0][0]} has no column {absent[0]}, which the schema has\n  advice    {fix}")
    columns: dict[str, np.ndarray] = {}
    formats: dict[str, CellFormat | TextFormat] = {}
    for name, cells_N in table.columns.items():
        column = schema.column(name)
        if name in schema.ignored:
            continue
        format = cell_format(column)
        if format is not None and cells_N.dtype == object:
            formats[name] = format
            columns[name] = _parsed(table, name, format)
        else:
            formats[name] = TextFormat(missing=column.missing)
            columns[name] = _with_names(_without_missing(cells_N, column), column)
        _check_values(replace(table, columns={name: columns[name]}), name, column)
    typed = replace(table, columns=columns, formats=formats)
    refuse_large_numbers(typed)
    return typed


def cell_format(column: ColumnSchema) -> CellFormat | None:
    """Return the format of the cells of a column of a schema; None for text."""
    if column.type == "number":
        return NumberFormat(
            decimal=column.decimal or ".", thousands=column.thousands or "", unit=column.unit, missing=column.missing
        )
    return DateFormat(format=column.format, missing=column.missing) if column.type == "date" else None


def refuse_large_numbers(table: Table) -> None:
    """Refuse infinite numbers, and numbers so large that they cannot be scaled.

    Raises:
        DataError: a column has such a number; the message names its file and row.
    """
    for name, cells_N in table.columns.items():
        if cells_N.dtype != object:
            reason = "infinite, or too large to be scaled"
            fix = "an empty cell for a missing value, or this value below missing in a schema"
            table.refuse(np.abs(cells_N) > LARGEST, name, reason, fix)


def _parsed(table: Table, name: str, format: CellFormat) -> np.ndarray:
    values_N, invalid_N = format.parse_column(table.columns[name])
    kind = "a date" if isinstance(format, DateFormat) else "a number"
    fix = f"correcting the cell, or the entry of {name} in the schema"
    table.refuse(invalid_N, name, f"not {kind} in the format of the schema", fix)
    return values_N


def _without_missing(cells_N: np.ndarray, column: ColumnSchema) -> np.ndarray:
    """Return a column of text in which the missing markers of the schema are None."""
    if cells_N.dtype != object or column.missing is None:
        return cells_N
    missing_N = np.array([cell is None or cell in column.missing for cell in cells_N], bool)
    missing_N &= np.array([cell not in column.levels for cell in cells_N], bool)
    column_N = cells_N.copy()
    column_N[missing_N] = None
    return column_N


def _with_names(cells_N: np.ndarray, column: ColumnSchema) -> np.ndarray:
    """Return a column of classes with the names of the classes. An unknown class stays, and is refused later."""
    if not column.names:
        return cells_N
    numbers_N = level_numbers(cells_N, column.levels, missing=column.missing)
    column_N = np.empty(len(cells_N), object)
    column_N[:] = [
        column.names[number] if number >= 0 else cell for number, cell in zip(numbers_N, cells_N.tolist(), strict=True)
    ]
    return column_N


def _check_values(table: Table, name: str, column: ColumnSchema) -> None:
    cells_N = table.columns[name]
    if column.range is not None and cells_N.dtype != object:
        least, most = column.range
        outside_N = (cells_N < least) | (cells_N > most)
        fix = f"correcting the cell, or another range of {name} in the schema"
        table.refuse(outside_N, name, f"outside the range {least:g} to {most:g} of the schema", fix)
    if column.levels and not column.names:
        fix = f"correcting the cell, or all levels of {name} in the schema"
        unknown_N = level_numbers(cells_N, column.levels, missing=column.missing) == UNKNOWN
        table.refuse(unknown_N, name, f"not one of the levels {', '.join(column.levels)} of the schema", fix)


def _without_missing_words(cells_N: np.ndarray, levels: Sequence[str]) -> np.ndarray:
    """Return a column of text in which the words for missing cells are None, except for declared levels."""
    kept = {level: level for level in levels}
    words = {cell: kept.get(cell) if is_missing(cell) else cell for cell in set(cells_N.tolist())}
    column_N = np.empty(len(cells_N), object)
    column_N[:] = [words[cell] for cell in cells_N.tolist()]
    return column_N


def _distinct(cells_N: np.ndarray) -> list[str]:
    return [cell for cell in dict.fromkeys(cells_N.tolist()) if not is_missing(cell)]


def _decimal_mark(detections: Mapping[str, Detection], cells: Mapping[str, Sequence[str]]) -> str | None:
    """Return the decimal mark of the columns whose format is certain; None if they have none, or both."""
    marks = set()
    for name, detection in detections.items():
        format = detection.format
        if isinstance(format, NumberFormat) and (format.decimal == "," or _is_certain(cells[name])):
            marks.add(format.decimal)
    return marks.pop() if len(marks) == 1 else None


def _is_certain(cells: Sequence[str]) -> bool:
    """Return whether some point in these plain numbers cannot be a thousands mark."""
    grouped = NumberFormat(decimal=",", thousands=".")
    return any("." in cell and grouped.parse(cell) is None for cell in cells)


def _point_notes(format: CellFormat, cells: Sequence[str]) -> list[str]:
    """Describe a decimal point that could be a thousands mark too, because each number has three digits after it."""
    is_number = isinstance(format, NumberFormat) and format.decimal == "."
    if not is_number or _is_certain(cells) or not any("." in cell for cell in cells):
        return []
    return ['the point is a decimal mark; decimal: "," and thousands: "." in a schema make it a thousands mark']


def _checked_format(table: Table, name: str, detection: Detection, targets: Sequence[str]) -> CellFormat | None:
    """Return the format, after a check of all cells. A column with few numbers is text."""
    cells_N = table.columns[name]
    fix = f"correcting the cell, or {name}: {detection.fix} in a schema" if detection.fix else SCHEMA_FIX
    if detection.reason == NOT_A_NUMBER:
        fix = f"correcting the cell, or {_text_fix(name, targets)}"
    wrong_N = np.array([cell in detection.wrong for cell in cells_N.tolist()], bool)
    if detection.format is None:
        table.refuse(wrong_N, name, detection.reason, fix)
        _refuse_stray_text(table, name, _text_fix(name, targets))
        return None
    num_missing = sum(map(is_missing, cells_N.tolist())) if detection.wrong else 0
    if detection.wrong and 2 * wrong_N.sum() >= max(1, len(cells_N) - num_missing):
        _refuse_stray_text(table, name, _text_fix(name, targets))
        return None
    table.refuse(wrong_N, name, detection.reason, fix)
    return detection.format


def _refuse_stray_text(table: Table, name: str, fix: str) -> None:
    """Refuse text in a column of numbers: in few rows, or in all rows of some files."""
    cells_N = table.columns[name]
    if has_codes(_distinct(cells_N)):
        return
    present_N = np.array([not is_missing(cell) for cell in cells_N], bool)
    text_N = PLAIN.parse_column(cells_N)[1]
    if 2 * text_N.sum() < present_N.sum():
        table.refuse(text_N, name, NOT_A_NUMBER, f"correcting the cell, or {fix}")
    start, numeric, textual = 0, list[str](), list[str]()
    for file, _, count in table.origins:
        part = slice(start, start := start + count)
        text_n = text_N[part][present_N[part]]
        if len(text_n):
            (textual if text_n.all() else [] if text_n.any() else numeric).append(file)
    if numeric and textual:
        table.refuse(text_N, name, f"text, but {numeric[0]} has only numbers in this column", fix)


def _text_fix(name: str, targets: Sequence[str]) -> str:
    if name in targets:
        return "'scenario.classes=[...]' with all classes"
    return f"'scenario.categories={{{name}:[...]}}' for a column of categories"


def _notes(format: CellFormat, cells: Sequence[str]) -> list[str]:
    """Describe a format that is not the usual one."""
    if isinstance(format, DateFormat):
        return ["dates, as days since 1970-01-01"]
    names = {",": "comma", ".": "point", " ": "space", "'": "apostrophe"}
    notes = ["decimal comma"] if format.decimal == "," and any("," in cell for cell in cells) else []
    notes += [f"thousands {names[format.thousands]}"] if format.thousands else []
    return notes + ([f"unit {format.unit}"] if format.unit else [])
