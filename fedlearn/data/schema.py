"""Describe the columns of a table in a schema: types, units, ranges, levels, and the roles of columns.

A schema fixes the reading of all files, so that each site reads the same cells as the same values. The module
`fedlearn.data.schema_files` reads and writes schemas as YAML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from fedlearn.advice import label
from fedlearn.errors import DataError, did_you_mean, is_number

ColumnType = Literal["number", "category", "text", "id", "date", "ignore"]
TYPES: tuple[str, ...] = get_args(ColumnType)
MISSING = ("", "?", "#N/A", "n/a", "N/A", "NA", "nan", "NaN", "NULL", "null", "None", "none")
SEPARATORS = (",", ";", "\t", "|")
DECIMAL_MARKS = (".", ",")
THOUSANDS_MARKS = ("", ",", ".", " ", "'")


@dataclass(frozen=True, kw_only=True)
class ColumnSchema:
    """Describe one column.

    Args:
        type: ``number``, ``category``, ``text``, ``id`` (text that is no feature), ``date`` or ``ignore``.
        unit: unit of a number, e.g. ``mmol/L``. A cell may repeat it; a cell with another unit is an error.
        range: smallest and largest value of a number, or of a date in days since 1970-01-01. Others are errors.
        scale: (centre, spread) for ``scenario.scale=constants``; None takes the middle and a quarter of ``range``.
        levels: values of a category in order, as in the file.
        names: names of the classes of a target, e.g. ``healthy`` for the level ``0``; empty for the levels themselves.
        missing: cells that count as missing in this column; None takes the markers of the table.
        decimal: decimal mark of this column; None takes the mark of the table.
        thousands: thousands mark of this column; None takes the mark of the table.
        format: format of a date in the notation of `datetime.datetime.strptime`; empty for ISO 8601.
    """

    type: ColumnType
    unit: str = ""
    range: tuple[float, float] | None = None
    scale: tuple[float, float] | None = None
    levels: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    missing: tuple[str, ...] | None = None
    decimal: str | None = None
    thousands: str | None = None
    format: str = ""

    def __post_init__(self) -> None:
        _check(self.type in TYPES, "type", self.type, ", ".join(TYPES), _closest_line("type", self.type, TYPES))
        for key, value in (("unit", self.unit), ("decimal", self.decimal), ("thousands", self.thousands)):
            _check(not value or self.type == "number", key, value, "a column of type number", "type: number")
        for key, pair in (("range", self.range), ("scale", self.scale)):
            is_numeric = pair is None or self.type in ("number", "date")
            _check(is_numeric, key, pair, "a column of type number or date", "type: number")
        _check(not self.levels or self.type == "category", "levels", self.levels, "type category", "type: category")
        _check(not self.format or self.type == "date", "format", self.format, "type date", "type: date")
        _check_marks(self.decimal, self.thousands)
        _check_pair("range", self.range, is_ordered=True)
        _check_pair("scale", self.scale, is_ordered=False)
        is_unique = len(set(self.levels)) == len(self.levels)
        _check(is_unique, "levels", _line(self.levels), "each level once", "levels: [no, yes]")
        fits = not self.names or len(set(self.names)) == len(self.names) == len(self.levels)
        _check(fits, "names", _line(self.names), "one name for each level", "names: [healthy, ill]")

    @property
    def is_feature(self) -> bool:
        """True unless the column is an id or left out."""
        return self.type not in ("id", "ignore")

    @property
    def constants(self) -> tuple[float, float] | None:
        """Centre and spread of a number: ``scale``, or the middle and a quarter of ``range``; None without both."""
        if self.scale is not None or self.range is None:
            return self.scale
        least, most = self.range
        return least / 2 + most / 2, (most - least) / 4


@dataclass(frozen=True, kw_only=True)
class TableSchema:
    """Describe all columns of a table, the roles of some columns, and the format of the files.

    Args:
        columns: description of each column by name.
        target: column to predict; None leaves it to ``scenario.target``.
        client: column that names the client of each row; None takes the names of files and folders.
        split: column that says for each row ``train``, ``validation`` or ``test``; None has no such column.
        group: column of groups, e.g. patients; all rows of a group are in the same part of a split.
        hold_out: groups, or clients without ``group``, whose rows are held out.
        missing: cells that count as missing.
        decimal: decimal mark of numbers, ``.`` or ``,``.
        thousands: thousands mark of numbers: a comma, a point, a space or an apostrophe; empty for none.
        encoding: encoding of text files; None detects it.
        separator: separator of text files; None detects it.
    """

    columns: Mapping[str, ColumnSchema] = field(default_factory=dict)
    target: str | None = None
    client: str | None = None
    split: str | None = None
    group: str | None = None
    hold_out: tuple[str, ...] = ()
    missing: tuple[str, ...] = MISSING
    decimal: str = "."
    thousands: str = ""
    encoding: str | None = None
    separator: str | None = None

    def __post_init__(self) -> None:
        _check(bool(self.columns), "columns", "empty", "at least one column", "columns: {age: {type: number}}")
        for role in ("target", "client", "split", "group"):
            name = getattr(self, role)
            known = name is None or name in self.columns
            fix = _closest_line(role, str(name), self.columns)
            _check(known, role, name, f"one of the columns {', '.join(self.columns)}", fix)
        _check(self.target is None or self.columns[self.target].is_feature, "target", self.target,
               "a column of type number or category", "type: category for this column")  # fmt: skip
        for name, column in self.columns.items():
            is_target = not column.names or name == self.target
            _check(is_target, f"names of {name}", _line(column.names), "names of the target only", f"target: {name}")
        _check_marks(self.decimal, self.thousands)
        is_known = self.separator in (None, *SEPARATORS)
        _check(is_known, "separator", repr(self.separator), "',', ';', '|' or a tab", 'separator: ";"')
        _check_encoding(self.encoding)

    def column(self, name: str) -> ColumnSchema:
        """Return a column with its missing markers and marks filled in.

        Raises:
            DataError: the schema has no such column.
        """
        if name not in self.columns:
            closest = did_you_mean(name, self.columns)
            hint = f"the name {closest}, or " if closest else ""
            raise DataError(
                f"the schema has no column {name}\n  expected  one of {', '.join(self.columns)}\n"
                f"  advice    {hint}a line for it below columns, e.g. {name}: {{type: ignore}}"
            )
        column = self.columns[name]
        missing = self.missing if column.missing is None else column.missing
        if column.type != "number":
            return replace(column, missing=missing)
        decimal, thousands = column.decimal or self.decimal, column.thousands
        return replace(
            column, missing=missing, decimal=decimal, thousands=self.thousands if thousands is None else thousands
        )

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the columns of clients, splits and groups, which are no features."""
        return tuple(name for name in (self.client, self.split, self.group) if name is not None)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns that are features."""
        left_out = (*self.roles, self.target)
        return tuple(name for name, column in self.columns.items() if column.is_feature and name not in left_out)

    @property
    def target_column(self) -> ColumnSchema | None:
        """Description of the target; None without a target."""
        return self.columns[self.target] if self.target is not None else None

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of the columns that no one reads: ids and ignored columns without a role."""
        return tuple(name for name, column in self.columns.items() if not column.is_feature and name not in self.roles)


def _check(condition: bool, key: str, value: object, expected: str, fix: str) -> None:
    if not condition:
        raise DataError(f"{key} is {value}\n  expected  {expected}\n{label(fix)}")


def _closest_line(key: str, value: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    return f"{key}: {did_you_mean(value, known) or next(iter(known))}"


def _line(values: tuple[str, ...]) -> str:
    return f"[{', '.join(values)}]"


def _check_marks(decimal: str | None, thousands: str | None) -> None:
    _check(decimal in (None, *DECIMAL_MARKS), "decimal", repr(decimal), "'.' or ','", 'decimal: ","')
    is_known = thousands in (None, *THOUSANDS_MARKS)
    _check(is_known, "thousands", repr(thousands), "',', '.', ' ', \"'\" or nothing", 'thousands: "."')
    differs = not thousands or thousands != (decimal or ".")
    _check(
        differs, "thousands", repr(thousands), "another mark than the decimal mark", 'decimal: "," with thousands: "."'
    )


def _check_pair(key: str, pair: tuple[float, float] | None, *, is_ordered: bool) -> None:
    if pair is None:
        return
    are_numbers = len(pair) == 2 and all(is_number(value) and math.isfinite(value) for value in pair)
    is_right = are_numbers and (pair[0] < pair[1] if is_ordered else pair[1] > 0)
    expected = "two numbers, the smaller first" if is_ordered else "two numbers: the centre and a spread > 0"
    _check(is_right, key, list(pair), expected, f"{key}: [0, 100]" if is_ordered else f"{key}: [50, 10]")


def _check_encoding(encoding: str | None) -> None:
    try:
        "".encode(encoding or "utf-8")
        is_known = True
    except (LookupError, UnicodeError):
        is_known = False
    _check(is_known, "encoding", encoding, "the name of an encoding", "encoding: utf-8")
