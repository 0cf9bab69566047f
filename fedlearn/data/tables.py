"""Hold tables of text and numbers, and read them from CSV, TSV, Parquet and JSON Lines files.

An error names file, row and column, never the content of a cell, because a real node sends the message to the
coordinator. Rows are counted as in a spreadsheet: the first line of a CSV file is row 1.

Shapes: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.advice import assignment, label
from fedlearn.data.cell_formats import PLAIN, CellFormat, TextFormat
from fedlearn.data.levels import to_categories
from fedlearn.errors import DataError, did_you_mean

MAX_EXACT_INTEGER = 2**53  # float64 holds all whole numbers up to this size
TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zip", ".tsv.zip", ".parquet", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Table:
    """Hold columns of equal length: object arrays of text or None, or float64 arrays with NaN for missing numbers.

    Args:
        columns: columns by name, in the order of the file.
        origins: sources of the rows: file, number of its first row, number of its rows.
        row_numbers: number of each row in its file; None if the rows of each file are consecutive.
        formats: formats of the columns of numbers and dates that come from text, and of text with its missing markers.
        notes: decisions about the reading that a user may want to see.
        row_labels: names of columns that only number or name the rows, e.g. an index of pandas.
        ignored: names of the columns of the files that were left out by a setting.
    """

    columns: Mapping[str, np.ndarray]
    origins: tuple[tuple[str, int, int], ...]
    row_numbers: np.ndarray | None = None
    formats: Mapping[str, CellFormat | TextFormat] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    row_labels: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return sum(count for _, _, count in self.origins)

    def row_location(self, row: int) -> str:
        """Return the file and row number of a row, for messages.

        >>> Table({}, (("a.csv", 2, 10), ("b.csv", 2, 5))).row_location(12)
        'b.csv, row 4'
        """
        start = 0
        for file, first, count in self.origins:
            if row < start + count:
                number = first + row - start if self.row_numbers is None else self.row_numbers[row]
                return f"{file}, row {number}"
            start += count
        raise IndexError("the table has no such row")

    def refuse(self, wrong_N: np.ndarray, column: str, reason: str, fix: str) -> None:
        """Raise a `DataError` if a mask marks cells of a column as wrong. The message names the first one.

        Args:
            wrong_N: mask of the wrong cells.
            column: name of the column.
            reason: fault of these cells, for the message.
            fix: one thing to try, for the message.
        """
        if wrong_N.any():
            raise DataError(f"{self.row_location(int(wrong_N.argmax()))}, column {column}: {reason}\n{label(fix)}")

    def column(self, name: str, setting: str) -> np.ndarray:
        """Return the column that a setting names.

        Args:
            name: value of the setting.
            setting: name of the setting, for the message.

        Raises:
            DataError: the table has no such column.
        """
        if name not in self.columns:
            by_lower = {known.lower(): known for known in self.columns}
            closest = (
                by_lower.get(str(name).lower()) or did_you_mean(str(name), self.columns) or next(iter(self.columns))
            )
            names = ", ".join(self.columns)
            fix = assignment(setting, closest)
            raise DataError(f"{setting} is {name}\n  expected  one of the columns {names}\n  try       {fix}")
        return self.columns[name]


def read_table(
    file: Path, *, ignored_columns: Sequence[str] = (), encoding: str | None = None, separator: str | None = None
) -> Table:
    """Read a table from one file. The cells of a text file stay text.

    Args:
        file: ``.csv`` or ``.tsv``, also compressed (``.gz``, ``.zip``), ``.parquet``, or ``.jsonl`` (an object per
            row). `fedlearn.data.text_files` lists the accepted forms of text.
        ignored_columns: columns to leave out. They may be absent, and may hold any type.
        encoding: encoding of a text file; None detects it.
        separator: separator of a text file; None detects it.

    Raises:
        DataError: the file cannot be read, has no header or no rows, a row of another length, or a column of another
            type.
        MissingExtra: pyarrow is needed and not installed.
    """
    from fedlearn.data import arrow_tables, json_lines, text_files

    if not is_table(file):
        fix = "save it as CSV or Parquet"
        raise DataError(
            f"{file.name} is no table\n  expected  a name that ends in {', '.join(TABLE_SUFFIXES)}\n  advice    {fix}"
        )
    if file.suffix.lower() == ".parquet":
        table = arrow_tables.read_parquet(file, ignored_columns)
    elif json_lines.is_json_lines(file):
        table = json_lines.read_json_lines(file, ignored_columns=ignored_columns)
    else:
        table = drop_columns(text_files.read_text_table(file, encoding=encoding, separator=separator), ignored_columns)
    if not len(table):
        raise DataError(f"{file.name} has no rows\n  advice    one row per example below the header")
    return table


def is_table(file: Path) -> bool:
    """Return True if `read_table` reads files of this name."""
    return file.name.lower().endswith(TABLE_SUFFIXES)


def table_stem(file: Path) -> str:
    """Return the name of a table without its suffix, e.g. ``a`` for ``a.csv.gz``."""
    ending = max((kind for kind in TABLE_SUFFIXES if file.name.lower().endswith(kind)), key=len)
    return file.name[: -len(ending)]


def concat_tables(tables: Sequence[Table]) -> Table:
    """Append tables to each other, with the columns in the order of the first table.

    Columns that only label the rows may be absent from some tables.

    Args:
        tables: one or more tables with the same columns, in any order.

    Raises:
        DataError: a table lacks a column of another table.
    """
    labels = frozenset().union(*(table.row_labels for table in tables))
    if labels:
        shared = {name for name in labels if all(name in table.columns for table in tables)}
        tables = [drop_columns(table, [*(labels - shared)]) for table in tables]
    first = tables[0]
    for table in tables[1:]:
        for left, right in ((first, table), (table, first)):
            if missing := [name for name in left.columns if name not in right.columns]:
                has_it, lacks_it = left.origins[0][0], right.origins[0][0]
                closest = did_you_mean(missing[0], [name for name in right.columns if name not in left.columns])
                fix = f"the name {missing[0]} for the column {closest}" if closest else "the same columns in each file"
                fix += f", or 'scenario.ignore=[{missing[0]}]'"
                raise DataError(f"{lacks_it} has no column {missing[0]}, which {has_it} has\n  advice    {fix}")
    columns = {name: _concat_cells([table.columns[name] for table in tables]) for name in first.columns}
    origins = tuple(origin for table in tables for origin in table.origins)
    numbers = np.concatenate([_row_numbers(table) for table in tables])
    notes = tuple(note for table in tables for note in table.notes)
    ignored = frozenset().union(*(table.ignored for table in tables))
    return Table(columns, origins, row_numbers=numbers, notes=notes, row_labels=labels, ignored=ignored)


def _row_numbers(table: Table) -> np.ndarray:
    if table.row_numbers is not None:
        return table.row_numbers
    return np.concatenate([np.arange(first, first + count) for _, first, count in table.origins] or [np.arange(0)])


def _concat_cells(parts: Sequence[np.ndarray]) -> np.ndarray:
    if len({part.dtype for part in parts}) > 1:  # a Parquet file has numbers, a CSV file has text
        parts = [to_categories(part) if part.dtype != object else part for part in parts]
    return np.concatenate(parts)


def without_row_labels(table: Table, used: Sequence[str]) -> Table:
    """Return a table without the columns that only label the rows, except for used columns."""
    dropped = [name for name in table.columns if name in table.row_labels and name not in used]
    notes = tuple(f"{name}: row labels, left out" for name in dropped)
    return replace(drop_columns(table, dropped), notes=table.notes + notes, row_labels=frozenset())


def take_rows(table: Table, rows: np.ndarray) -> Table:
    """Return some rows of a table. The origin of these rows is not kept."""
    columns = {name: cells[rows] for name, cells in table.columns.items()}
    return Table(columns, (("some rows", 1, len(rows)),), formats=table.formats)


def check_header(file: Path, header: Sequence[str]) -> None:
    """Refuse a header with two columns of the same name.

    Raises:
        DataError: the header is ambiguous.
    """
    for name in [name for name in header if header.count(name) > 1][:1]:
        fault = f"the column {name} twice" if name else "two columns without a name"
        raise DataError(f"{file.name} has {fault}\n  advice    a first row with a different name for each column")


def missing_column(table: Table, name: str, expected: Sequence[str], *, can_be_missing: bool) -> DataError:
    """Return the error for a table that lacks a column.

    Args:
        table: the table.
        name: name of the missing column.
        expected: names of all columns that the model reads.
        can_be_missing: whether the model has values that replace this column.
    """
    source = table.origins[0][0] if table.origins else "the table"
    hint = ", or --allow-missing, which counts its cells as missing" if can_be_missing else ""
    return DataError(
        f"{source} has no column {name}\n  expected  {', '.join(expected)}, in any order\n"
        f"  advice    add the column{hint}"
    )


def drop_columns(table: Table, names: Sequence[str]) -> Table:
    """Return a table without these columns; names of absent columns have no effect."""
    columns = {name: cells for name, cells in table.columns.items() if name not in names}
    return replace(table, columns=columns, ignored=table.ignored | (table.columns.keys() - columns.keys()))


def table_from_columns(columns: Mapping[Any, Any], name: str = "the table") -> Table:
    """Return a table of a data frame, or of a mapping from column to values.

    Args:
        columns: numbers, text, booleans or dates by column name; None and NaN are missing.
        name: name of the source, for messages.

    Raises:
        DataError: there are no rows, or the columns differ in length.
    """
    cells = {str(column): _python_cells(np.asarray(columns[column])) for column in columns}
    lengths = {len(column_N) for column_N in cells.values()}
    if len(lengths) != 1 or lengths == {0}:
        fix = "one value per row and column"
        raise DataError(f"{name} has no rows, or columns of different lengths\n  advice    {fix}")
    return Table(cells, ((name, 1, lengths.pop()),))


def _python_cells(values_N: np.ndarray) -> np.ndarray:
    if values_N.dtype.kind == "f":
        return values_N.astype(np.float64)
    if values_N.dtype.kind in "iu":
        return whole_numbers(values_N)
    values = values_N.astype(str) if values_N.dtype.kind in "Mm" else values_N
    return text_cells(map(_text_of, values.tolist()))


def _text_of(value: Any) -> str:
    is_nan = isinstance(value, float) and math.isnan(value)
    return "" if value is None or is_nan or str(value) in ("<NA>", "NaT") else str(value)


def whole_numbers(values_N: np.ndarray) -> np.ndarray:
    """Return integers as float64, or as text if a float64 cannot hold all of them, e.g. ids of 19 digits."""
    if len(values_N) and max(int(values_N.max()), -int(values_N.min())) > MAX_EXACT_INTEGER:
        return np.array([str(value) for value in values_N.tolist()], object)
    return values_N.astype(np.float64)


def text_cells(cells: Iterable[str]) -> np.ndarray:
    """Return cells as an object array of text without spaces around it, with None for empty cells."""
    stripped = [cell.strip() for cell in cells]
    column_N = np.empty(len(stripped), object)
    column_N[:] = [cell or None for cell in stripped]
    return column_N


def to_numbers(cells_N: np.ndarray, format: CellFormat = PLAIN) -> tuple[np.ndarray, np.ndarray]:
    """Return a column as float64 with NaN for missing values, and a mask of the cells that are not numbers.

    Args:
        cells_N: text or numbers.
        format: format of the text.

    >>> to_numbers(np.array(["1.5", None, "old"], object))
    (array([1.5, nan, nan]), array([False, False,  True]))
    """
    if cells_N.dtype != object:
        return cells_N, np.zeros(len(cells_N), bool)
    return format.parse_column(cells_N)
