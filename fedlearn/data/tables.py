"""Read tables from CSV, TSV and Parquet files, with checks.

An error names file, row and column, never the content of a cell, because a real node sends the message to the
coordinator. Rows are counted as in a spreadsheet: the header of a CSV file is row 1.

Shapes: N rows.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.data.download.decompress import open_decompressed
from fedlearn.errors import DataError, MissingExtra, did_you_mean

TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})  # in lower case
MAX_CELL_CHARS = 2**24  # characters in one cell


@dataclass(frozen=True)
class Table:
    """Hold columns of equal length: object arrays of text or None, or float64 arrays with NaN for missing numbers.

    Args:
        columns: columns by name, in the order of the file.
        origins: sources of the rows: file, number of its first row, number of its rows.
    """

    columns: Mapping[str, np.ndarray]
    origins: tuple[tuple[str, int, int], ...]

    def __len__(self) -> int:
        return sum(count for _, _, count in self.origins)

    def row_location(self, row: int) -> str:
        """Return the file and row number of a row, for messages.

        >>> Table({}, (("a.csv", 2, 10), ("b.csv", 2, 5))).row_location(12)
        'b.csv, row 4'
        """
        for file, first, count in self.origins:
            if row < count:
                return f"{file}, row {first + row}"
            row -= count
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
            raise DataError(f"{self.row_location(int(wrong_N.argmax()))}, column {column}: {reason}\n  try       {fix}")

    def column(self, name: str, setting: str) -> np.ndarray:
        """Return the column that a setting names.

        Args:
            name: value of the setting.
            setting: name of the setting, for the message.

        Raises:
            DataError: the table has no such column.
        """
        if name not in self.columns:
            closest = did_you_mean(str(name), self.columns) or next(iter(self.columns))
            names = ", ".join(self.columns)
            raise DataError(
                f"{setting} is {name}\n  expected  one of the columns {names}\n  try       {setting}={closest}"
            )
        return self.columns[name]


def read_table(file: Path, *, ignored_columns: Sequence[str] = ()) -> Table:
    """Read a table from one file.

    Args:
        file: ``.csv`` (separated by commas, semicolons or tabs, as in its header), ``.tsv`` (tabs), both also
            compressed (``.gz``), or ``.parquet``.
        ignored_columns: columns to leave out. They may be absent, and may hold any type.

    Raises:
        DataError: the file cannot be read, has no header or no rows, a row of another length, or a column of another
            type.
        MissingExtra: pyarrow is needed and not installed.
    """
    if not is_table(file):
        fix = "saving it as CSV or Parquet"
        raise DataError(
            f"{file.name} is no table\n  expected  a name that ends in {', '.join(TABLE_SUFFIXES)}\n  try       {fix}"
        )
    table = (
        _read_parquet(file, ignored_columns)
        if file.suffix.lower() == ".parquet"
        else drop_columns(_read_text(file), ignored_columns)
    )
    if not len(table):
        raise DataError(f"{file.name} has no rows\n  try       removing the file, or adding one row per example")
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

    A text column becomes numeric if all its cells are numbers or missing.

    Args:
        tables: one or more tables with the same columns, in any order.

    Raises:
        DataError: a table lacks a column of another table.
    """
    first = tables[0]
    for table in tables[1:]:
        for left, right in ((first, table), (table, first)):
            if missing := [name for name in left.columns if name not in right.columns]:
                has_it, lacks_it = left.origins[0][0], right.origins[0][0]
                fix = "the same columns in each file, or scenario.ignore=[...] for the other columns"
                raise DataError(f"{lacks_it} has no column {missing[0]}, which {has_it} has\n  try       {fix}")
    columns = {name: _concat_cells([table.columns[name] for table in tables]) for name in first.columns}
    return Table(columns, tuple(origin for table in tables for origin in table.origins))


def take_rows(table: Table, rows: np.ndarray) -> Table:
    """Return some rows of a table. The origin of these rows is not kept."""
    columns = {name: cells[rows] for name, cells in table.columns.items()}
    return Table(columns, (("some rows", 1, len(rows)),))


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
        f"  try       adding the column{hint}"
    )


def drop_columns(table: Table, names: Sequence[str]) -> Table:
    """Return a table without these columns; names of absent columns have no effect."""
    return Table({name: cells for name, cells in table.columns.items() if name not in names}, table.origins)


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
        raise DataError(f"{name} has no rows, or columns of different lengths\n  try       {fix}")
    return Table(cells, ((name, 1, lengths.pop()),))


def _python_cells(values_N: np.ndarray) -> np.ndarray:
    if values_N.dtype.kind in "iuf":
        return values_N.astype(np.float64)
    texts = values_N.astype(str) if values_N.dtype.kind in "Mm" else map(str, values_N.tolist())
    return _cells("" if text in ("<NA>", "NaT") else text for text in texts)


def to_numbers(cells_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a column as float64 with NaN for missing values, and a mask of the cells that are not numbers.

    >>> to_numbers(np.array(["1.5", None, "old"], object))
    (array([1.5, nan, nan]), array([False, False,  True]))
    """
    if cells_N.dtype != object:
        return cells_N, np.zeros(len(cells_N), bool)
    missing_N = np.array([cell is None for cell in cells_N], bool)
    with suppress(ValueError):  # fast path: all cells are plain numbers
        values_N = np.where(missing_N, math.nan, cells_N).astype(np.float64)
        if (np.isfinite(values_N) | missing_N).all() and "_" not in "".join(cells_N[~missing_N]):
            return values_N, np.zeros(len(cells_N), bool)
    values = [_number(cell) for cell in cells_N]
    invalid_N = np.array([value is None for value in values], bool)
    return np.array([math.nan if value is None else value for value in values], np.float64), invalid_N


def to_categories(cells_N: np.ndarray) -> np.ndarray:
    """Return a column as text in canonical form, with None for missing values. 1, 1.0 and "1" are the same category.

    >>> to_categories(np.array(["1.0", "f", None], object)), to_categories(np.array([1.0]))
    (array(['1', 'f', None], dtype=object), array(['1'], dtype=object))
    """
    return np.array([None if _is_missing(cell) else to_category(cell) for cell in cells_N], object)


def to_category(cell: Any) -> str:
    """Return a cell in the canonical form, in which categories are compared."""
    value = _number(str(cell))
    return str(cell) if value is None or math.isnan(value) else f"{value:.15g}"


def _is_missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _number(cell: str | None) -> float | None:
    """Return the number in a cell, NaN for a missing value, None for other text."""
    if cell is None:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in cell else None


def _concat_cells(parts: Sequence[np.ndarray]) -> np.ndarray:
    if len({part.dtype for part in parts}) > 1:  # a Parquet file has numbers, a CSV file has text
        parts = [to_categories(part) if part.dtype != object else part for part in parts]
    cells_N = np.concatenate(parts)
    values_N, invalid_N = to_numbers(cells_N)
    return cells_N if invalid_N.any() else values_N


def _read_text(file: Path) -> Table:
    text = _text(file)
    if not text.strip():
        raise DataError(
            f"{file.name} is empty\n  try       a header with the names of the columns, followed by the rows"
        )
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(file, text.splitlines()[0]), strict=True)
    csv.field_size_limit(MAX_CELL_CHARS)
    try:
        header = [name.strip() for name in next(lines)]
        check_header(file, header)
        rows = _drop_empty_end([*lines])
    except csv.Error as error:
        fix = "correcting the line, or saving the file as CSV again"
        raise DataError(f"{file.name}, line {lines.line_num}: {error}\n  try       {fix}") from error
    return table_of_rows(file, header, rows, first_row=2)


def table_of_rows(file: Path, header: Sequence[str], rows: Sequence[Sequence[str]], *, first_row: int) -> Table:
    """Return the table of some rows of a text file.

    Args:
        file: file of the rows, for messages.
        header: names of the columns.
        rows: cells of each row.
        first_row: number of the first row in the file.

    Raises:
        DataError: a row has another number of cells than the header.
    """
    for number, row in enumerate(rows, start=first_row):
        if len(row) != len(header):
            fix = "quotes around cells that contain a comma or a line break"
            cells = f"{len(row)} cells, but the header has {len(header)} columns"
            raise DataError(f"{file.name}, row {number} has {cells}\n  try       {fix}")
    columns = {name: _cells(row[place] for row in rows) for place, name in enumerate(header)}
    return Table(columns, ((file.name, first_row, len(rows)),))


def _drop_empty_end(rows: list[list[str]]) -> list[list[str]]:
    """Remove the empty lines at the end of a file."""
    while rows and not rows[-1]:
        rows.pop()
    return rows


def _text(file: Path) -> str:
    try:
        with open_decompressed(file) as raw:
            return raw.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file.name}, row {line} is not UTF-8\n  try       saving the file as UTF-8") from error


def delimiter_of(file: Path, header: str) -> str:
    """Return the separator of a text file: a tab, or in a ``.csv`` file the most frequent separator of its header."""
    return max(",;\t", key=header.count) if file.name.lower().removesuffix(".gz").endswith(".csv") else "\t"


def check_header(file: Path, header: Sequence[str]) -> None:
    """Refuse a header with a column that has no name, or a name that another column has.

    Raises:
        DataError: the header is ambiguous.
    """
    duplicates = {name for name in header if header.count(name) > 1}
    for name in duplicates or [name for name in header if not name]:
        fault = f"the column {name} twice" if name else "a column without a name"
        raise DataError(f"{file.name} has {fault}\n  try       a first row with a different name for each column")


def _cells(cells: Any) -> np.ndarray:
    stripped = [cell.strip() for cell in cells]
    column = np.empty(len(stripped), object)
    column[:] = [None if cell.lower() in MISSING else cell for cell in stripped]
    return column


def _read_parquet(file: Path, ignored_columns: Sequence[str]) -> Table:
    with open_parquet(file) as parquet:
        arrow_table = parquet.read()
    check_header(file, arrow_table.column_names)
    return from_arrow(arrow_table, file.name, ignored_columns=ignored_columns)


@contextmanager
def open_parquet(file: Path) -> Iterator[Any]:
    """Open a Parquet file as a ``pyarrow.parquet.ParquetFile``.

    Raises:
        DataError: the file cannot be read.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra(f"{file.name} (Parquet)", "data") from error
    try:
        with parquet.ParquetFile(file) as opened:
            yield opened
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file.name} cannot be read: {reason}\n  try       saving it as Parquet again") from error


def from_arrow(arrow_table: Any, name: str, *, ignored_columns: Sequence[str] = (), first_row: int = 1) -> Table:
    """Convert an Arrow table.

    Args:
        arrow_table: a ``pyarrow.Table``.
        name: name of its source, for messages.
        ignored_columns: columns to leave out.
        first_row: number of its first row in the source.

    Raises:
        DataError: the type of a column is not a number, text, date or boolean.
    """
    wanted = [column for column in arrow_table.column_names if column not in ignored_columns]
    columns = {column: _from_arrow(name, column, arrow_table[column]) for column in wanted}
    return Table(columns, ((name, first_row, arrow_table.num_rows),))


def _from_arrow(file: str, name: str, column: Any) -> np.ndarray:
    import pyarrow as arrow

    kind = column.type
    if arrow.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if arrow.types.is_integer(kind) or arrow.types.is_floating(kind) or arrow.types.is_decimal(kind):
        return np.array(column.cast(arrow.float64(), safe=False).to_numpy(), np.float64)
    if arrow.types.is_temporal(kind) or arrow.types.is_boolean(kind):
        column, kind = column.cast(arrow.string()), arrow.string()
    if arrow.types.is_string(kind) or arrow.types.is_large_string(kind):
        return _cells("" if cell is None else cell for cell in column.to_pylist())
    raise DataError(
        f"{file}, column {name} holds {kind}\n  expected  numbers, text, dates or booleans\n"
        f"  try       'scenario.ignore=[{name}]'"
    )
