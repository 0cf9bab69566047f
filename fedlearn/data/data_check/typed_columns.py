"""Read the types of columns as a run does. A column that ends a run stays text here, so that all faults appear at once.

Shapes: N rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedlearn.data.cell_formats import DateFormat, NumberFormat, is_missing
from fedlearn.data.format_detection import detect_format
from fedlearn.data.tables import Table
from fedlearn.data.typed_tables import Reading, type_table
from fedlearn.errors import DataError

MARK_NAMES = {",": "comma", ".": "point", " ": "space", "'": "apostrophe"}


@dataclass(frozen=True, kw_only=True)
class TypedColumns:
    """Hold a table with typed columns.

    Args:
        table: all columns: floats for numbers and dates, text for all others.
        refused: message of the error for each column that a run refuses.
        wrong: cells of a refused column that differ from the format of the others; they are missing in ``table``.
        row_labels: columns that only number the rows, which a run leaves out.
        markers: cells of each column that count as missing, as in the file, and their number.
    """

    table: Table
    refused: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, np.ndarray] = field(default_factory=dict)
    row_labels: frozenset[str] = frozenset()
    markers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """Decisions about the reading of cells, and the markers of missing cells."""
        markers = [
            f"{name}: {' and '.join(f'{cell} ({count:,})' for cell, count in counts.items())} counts as missing"
            for name, counts in self.markers.items()
        ]
        return (*dict.fromkeys(self.table.notes), *markers)

    def is_date(self, name: str) -> bool:
        """Return whether a column has dates that the run reads as days."""
        return isinstance(self.table.formats.get(name), DateFormat)

    def format_text(self, name: str, *, is_whole: bool) -> str:
        """Return the format of the cells of a column, e.g. ``decimal comma, unit mg``; empty for the usual format.

        Args:
            name: name of the column.
            is_whole: whether all numbers are whole, so that they have no decimal mark.
        """
        format = self.table.formats.get(name)
        if isinstance(format, DateFormat):
            return format.format
        if not isinstance(format, NumberFormat):
            return ""
        parts = ["decimal comma"] * (format.decimal == "," and not is_whole)
        parts += [f"thousands {MARK_NAMES[format.thousands]}"] if format.thousands else []
        return ", ".join(parts + ([f"unit {format.unit}"] if format.unit else []))


def type_leniently(raw: Table, reading: Reading) -> TypedColumns:
    """Return the typed columns of a table. Columns with an error stay text.

    Args:
        raw: columns as in the files.
        reading: schema, or declared columns.

    Raises:
        DataError: the table and the schema have different columns.
    """
    refused: dict[str, str] = {}
    try:
        typed = type_table(raw, reading)
    except DataError:
        if reading.schema is not None:
            raise
        typed, refused = _type_separately(raw, reading)
    labels = frozenset(raw.columns.keys() - typed.columns.keys() - refused.keys())
    columns = {name: typed.columns.get(name, cells_N) for name, cells_N in raw.columns.items()}
    formats, wrong = dict(typed.formats), {}
    for name in refused:
        distinct = [cell for cell in dict.fromkeys(columns[name].tolist()) if not is_missing(cell)]
        format = detect_format(distinct).format if columns[name].dtype == object else None
        if format is not None:
            formats[name], (columns[name], invalid_N) = format, format.parse_column(columns[name])
            wrong[name] = raw.columns[name].copy()
            wrong[name][~invalid_N] = None
    table = replace(typed, columns=columns, formats=formats)
    return TypedColumns(table=table, refused=refused, wrong=wrong, row_labels=labels, markers=_markers(raw, columns))


def _type_separately(raw: Table, reading: Reading) -> tuple[Table, dict[str, str]]:
    """Return the columns that have a type, and the errors of the others.

    A column alone may be ambiguous, as 1,234 is. So it is tried again together with the columns that have a type.
    """
    errors: dict[str, str] = {}
    for name in raw.columns:
        try:
            type_table(_some(raw, {name}), reading)
        except DataError as error:
            errors[name] = str(error)
    accepted = raw.columns.keys() - errors.keys()
    typed = type_table(_some(raw, accepted), reading)
    for name in [*errors]:
        try:
            typed = type_table(_some(raw, {*accepted, name}), reading)
        except DataError as error:
            errors[name] = str(error)
        else:
            accepted = {*accepted, name}
            del errors[name]
    return typed, errors


def _some(table: Table, names: set[str]) -> Table:
    columns = {name: cells_N for name, cells_N in table.columns.items() if name in names}
    return replace(table, columns=columns, row_labels=table.row_labels & names)


def _markers(raw: Table, columns: Mapping[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """Return the cells that are missing in the typed columns although the file has text there."""
    found = {}
    for name, cells_N in raw.columns.items():
        if cells_N.dtype != object:
            continue
        words = {cell for cell in set(cells_N.tolist()) if cell is not None and is_missing(cell)}
        if words and columns[name].dtype == object:
            words -= {cell for cell in set(columns[name].tolist()) if cell is not None}
        if words:
            found[name] = dict(Counter(cell for cell in cells_N.tolist() if cell in words).most_common())
    return found
