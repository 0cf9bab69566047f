"""Read tables from JSON Lines: one object with the cells of a row per line.

Lists and objects in a cell, e.g. the messages of a chat, become JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.data.download.decompress import open_decompressed
from fedlearn.data.tables import Table, text_cells, whole_numbers
from fedlearn.errors import DataError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
MAX_LINE_BYTES = 2**26  # bytes of a line
Row = tuple[int, dict[str, Any]]  # number of the line, and its cells


def read_json_lines(file: Path, *, ignored_columns: Sequence[str] = ()) -> Table:
    """Read all lines of a file; see `fedlearn.data.tables.read_table`."""
    return _table(file, [*read_objects(file)], ignored_columns)


def read_json_batches(file: Path, batch_size: int) -> Iterator[Table]:
    """Yield the lines of a file in tables of ``batch_size`` rows."""
    rows = read_objects(file)
    while batch := list(islice(rows, batch_size)):
        yield _table(file, batch)


def is_json_lines(file: Path) -> bool:
    """Return True for the name of a file of JSON Lines."""
    return file.name.lower().endswith(JSON_SUFFIXES)


def json_text(value: Any) -> str:
    """Return a list or an object of a cell as JSON text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def read_objects(file: Path) -> Iterator[Row]:
    """Yield the number and the object of each line that is not empty.

    Raises:
        DataError: a line is no JSON object; the message names the line.
    """
    fix = 'a line such as {"text": "...", "label": "..."}'
    with open_decompressed(file) as raw:
        number = 0
        while line := raw.readline(MAX_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            try:
                content = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                reason = f"{file.name}, line {number}, is no JSON ({type(error).__name__})"
                raise DataError(f"{reason}\n  expected  an object per line\n  advice    {fix}") from error
            if not isinstance(content, dict):
                problem = f"{file.name}, line {number}, is no JSON object"
                raise DataError(f"{problem}\n  expected  an object per line\n  advice    {fix}")
            yield number, content


def _table(file: Path, rows: Sequence[Row], ignored_columns: Sequence[str] = ()) -> Table:
    names = dict.fromkeys(name for _, content in rows for name in content)
    columns = {
        name: _column([content.get(name) for _, content in rows]) for name in names if name not in ignored_columns
    }
    numbers_N = np.array([number for number, _ in rows], np.int64)
    origins = ((file.name, int(numbers_N[0]) if len(rows) else 1, len(rows)),)
    ignored = frozenset(names) & frozenset(ignored_columns)
    return Table(columns, origins, row_numbers=numbers_N, ignored=ignored)


def _column(cells: Sequence[Any]) -> np.ndarray:
    """Return numbers as float64 if all cells are numbers or missing, and text otherwise."""
    present = [cell for cell in cells if cell is not None]
    if present and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in present):
        if all(isinstance(cell, int) for cell in present):
            values_N = whole_numbers(np.array(present, object))
            column_N = np.full(len(cells), None, object) if values_N.dtype == object else np.full(len(cells), np.nan)
            column_N[[cell is not None for cell in cells]] = values_N
            return column_N
        return np.array([np.nan if cell is None else float(cell) for cell in cells], np.float64)
    return text_cells("" if cell is None else _text(cell) for cell in cells)


def _text(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    return str(cell).lower() if isinstance(cell, bool) else json_text(cell)
