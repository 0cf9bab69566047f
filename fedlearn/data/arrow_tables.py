"""Read tables from Parquet files and Arrow tables. Types of Arrow determine the types of columns.

Shapes: N rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.advice import assignment
from fedlearn.data.json_lines import json_text
from fedlearn.data.tables import Table, check_header, text_cells, whole_numbers
from fedlearn.errors import DataError, MissingExtra

INDEX_NAME = re.compile(r"__index_level_\d+__|Unnamed: 0")
SECONDS_PER_DAY = 86_400


def read_parquet(file: Path, ignored_columns: Sequence[str]) -> Table:
    """Read a Parquet file; see `fedlearn.data.tables.read_table`."""
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
        raise DataError(f"{file.name} cannot be read: {reason}\n  advice    saving it as Parquet again") from error


def from_arrow(arrow_table: Any, name: str, *, ignored_columns: Sequence[str] = (), first_row: int = 1) -> Table:
    """Convert an Arrow table. The index columns of pandas become row labels.

    Args:
        arrow_table: a ``pyarrow.Table``.
        name: name of its source, for messages.
        ignored_columns: columns to leave out.
        first_row: number of its first row in the source.

    Raises:
        DataError: the type of a column is not a number, text, date, boolean or a list of texts.
    """
    wanted = [column for column in arrow_table.column_names if column not in ignored_columns]
    columns = {column: _from_arrow(name, column, arrow_table[column]) for column in wanted}
    labels = frozenset(
        column for column in wanted if column in _index_of_pandas(arrow_table) or INDEX_NAME.fullmatch(column)
    )
    ignored = frozenset(arrow_table.column_names) - frozenset(wanted)
    return Table(columns, ((name, first_row, arrow_table.num_rows),), row_labels=labels, ignored=ignored)


def _index_of_pandas(arrow_table: Any) -> list[Any]:
    """Return the names of the columns that were the index of a data frame, from the metadata of pandas."""
    try:
        index = (arrow_table.schema.pandas_metadata or {}).get("index_columns", [])
    except (ValueError, AttributeError):  # damaged metadata
        return []
    return index if isinstance(index, list) else []


def _from_arrow(file: str, name: str, column: Any) -> np.ndarray:
    import pyarrow as arrow

    kind = column.type
    if arrow.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if arrow.types.is_null(kind):
        return np.full(len(column), None, object)
    if arrow.types.is_integer(kind) and not column.null_count:
        return whole_numbers(column.to_numpy())
    if arrow.types.is_integer(kind):
        values = column.to_pylist()
        present_N = whole_numbers(np.array([value for value in values if value is not None], object))
        return _with_missing(values, present_N)
    if arrow.types.is_floating(kind) or arrow.types.is_decimal(kind):
        return np.array(column.cast(arrow.float64(), safe=False).to_numpy(), np.float64)
    if arrow.types.is_duration(kind):
        seconds_N = column.cast(arrow.duration("us"), safe=False).cast(arrow.int64()).cast(arrow.float64(), safe=False)
        return np.array(seconds_N.to_numpy(), np.float64) / (1e6 * SECONDS_PER_DAY)
    if arrow.types.is_temporal(kind) or arrow.types.is_boolean(kind):
        column, kind = column.cast(arrow.string()), arrow.string()
    if arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or _is_string_view(kind):
        return text_cells("" if cell is None else cell for cell in column.to_pylist())
    if _is_list_of_texts(kind):
        return text_cells("" if cell is None else json_text(cell) for cell in column.to_pylist())
    raise DataError(
        f"{file}, column {name} holds {kind}\n  expected  numbers, text, dates or booleans\n"
        f"  try       {assignment('scenario.ignore', [name])}"
    )


def _is_list_of_texts(kind: Any) -> bool:
    """Return whether a cell is a list of texts or of records, e.g. the messages of a chat."""
    import pyarrow as arrow

    if not (arrow.types.is_list(kind) or arrow.types.is_large_list(kind)):
        return False
    inner = kind.value_type
    return arrow.types.is_struct(inner) or arrow.types.is_string(inner) or arrow.types.is_large_string(inner)


def _is_string_view(kind: Any) -> bool:
    return str(kind) == "string_view"


def _with_missing(values: Sequence[int | None], present_N: np.ndarray) -> np.ndarray:
    missing_N = np.array([value is None for value in values], bool)
    is_text = present_N.dtype == object
    column_N = np.full(len(values), None, object) if is_text else np.full(len(values), np.nan)
    column_N[~missing_N] = present_N
    return column_N
