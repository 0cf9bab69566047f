"""Turn the text of cells into numbers: decimal and thousands marks, units, dates.

A format belongs to a whole column and is stored with the model, so new cells are read as the training cells.

Shapes: N cells.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

_MARKERS = ("", "?", "na", "n/a", "#n/a", "nan", "null", "none", "nat", "<na>")
_CASES = (str.lower, str.upper, str.capitalize)
MISSING_MARKERS = frozenset({case(marker) for marker in _MARKERS for case in _CASES} | {"NaN", "NaT"})
OTHER_MARKS = dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\u2014"), "-") | {
    0x2019: "'",
    0x66B: ".",
    0x66C: ",",
}
LARGEST = 1e100  # a larger number stands for a missing value in most files; its square overflows
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECONDS_PER_DAY = 86_400
ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d+)?)?\s?(Z|[+-]\d\d(:?\d\d)?)?)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """Read numbers with a decimal mark, a thousands mark and a unit.

    Args:
        decimal: decimal mark, ``.`` or ``,``.
        thousands: mark between groups of digits: a comma, a point, a space or an apostrophe; empty for none.
        unit: text before or after the number, e.g. ``mg``, ``%`` or ``€``. A cell may lack it.
        missing: cells that count as missing; None takes the usual words, e.g. ``NA``.

    >>> NumberFormat(decimal=",", thousands=".", unit="mg").parse("1.234,5 mg")
    1234.5
    """

    decimal: str = "."
    thousands: str = ""
    unit: str = ""
    missing: tuple[str, ...] | None = None
    kind: ClassVar[str] = "number format"

    def __post_init__(self) -> None:
        are_texts = all(isinstance(value, str) for value in (self.decimal, self.thousands, self.unit))
        is_list = self.missing is None or isinstance(self.missing, tuple)
        if not are_texts or not is_list or self.decimal not in (".", ",") or len(self.thousands) > 1:
            raise ValueError("a wrong format of numbers")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Pattern of a number without its unit, in normalized text."""
        decimal, mark = re.escape(self.decimal), re.escape(self.thousands)
        inner = "[0-9]{2,3}" if mark == "," else "[0-9]{3}"  # also groups of two digits, as in 12,34,567
        grouped = rf"|[1-9][0-9]{{0,2}}(?:{mark}{inner})*{mark}[0-9]{{3}}" if mark else ""
        return re.compile(rf"[+-]?(?:(?:[0-9]+{grouped})(?:{decimal}[0-9]*)?|{decimal}[0-9]+)(?:[eE][+-]?[0-9]+)?")

    def parse(self, cell: str) -> float | None:
        """Return the number in a cell, NaN for a missing cell, None for other text."""
        if is_missing(cell, self.missing):
            return math.nan
        text = without_unit(normalized(cell), self.unit)
        if not self.pattern.fullmatch(text):
            return None
        value = float((text.replace(self.thousands, "") if self.thousands else text).replace(self.decimal, "."))
        return value if math.isfinite(value) else None

    def parse_column(self, cells_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of a column of text, NaN for missing cells, and a mask of the cells without number."""
        is_plain = self == NumberFormat(missing=self.missing)
        return (self.missing is None and is_plain and _plain_numbers(cells_N)) or _parse(self.parse, cells_N)


@dataclass(frozen=True, kw_only=True)
class DateFormat:
    """Read dates and times as days since 1970-01-01. A time without zone counts as UTC.

    Args:
        format: format in the notation of `datetime.datetime.strptime`; empty for ISO 8601, e.g. 2026-01-31 08:30.
        missing: cells that count as missing; None takes the usual words, e.g. ``NA``.

    >>> DateFormat(format="%d.%m.%Y").parse("02.01.1970"), DateFormat().parse("1970-01-01T12:00")
    (1.0, 0.5)
    """

    format: str = ""
    missing: tuple[str, ...] | None = None
    kind: ClassVar[str] = "date format"

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or not (self.missing is None or isinstance(self.missing, tuple)):
            raise ValueError("a wrong format of dates")

    def parse(self, cell: str) -> float | None:
        """Return the days since 1970-01-01, NaN for a missing cell, None for other text."""
        if is_missing(cell, self.missing):
            return math.nan
        with suppress(ValueError, OverflowError):
            if not self.format:
                return _days(datetime.fromisoformat(cell)) if ISO_DATE.fullmatch(cell) else None
            moment = datetime.strptime(cell, self.format)
            return _days(moment if "%Y" in self.format or "%y" in self.format else moment.replace(year=1970))
        return None

    def parse_column(self, cells_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the days of a column of text, with NaN for missing cells, and a mask of the cells without date."""
        return _parse(self.parse, cells_N)


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """Read text.

    Args:
        missing: cells that count as missing; None takes the usual words, e.g. ``NA``.
    """

    missing: tuple[str, ...] | None = None
    kind: ClassVar[str] = "text format"

    def __post_init__(self) -> None:
        if not (self.missing is None or isinstance(self.missing, tuple)):
            raise ValueError("a wrong format of text")


CellFormat = NumberFormat | DateFormat
PLAIN = NumberFormat()
TEXT = TextFormat()


def is_missing(cell: Any, missing: tuple[str, ...] | None = None) -> bool:
    """Return whether a cell counts as missing.

    Args:
        cell: text, number or None.
        missing: texts that count as missing; None takes the usual words in any case.
    """
    if cell is None or cell != cell:
        return True
    return cell in (MISSING_MARKERS if missing is None else missing)


def normalized(cell: str) -> str:
    """Return a cell with ASCII digits, minus signs and spaces, without spaces around it or after its sign.

    >>> normalized("\u2212 \uff11\u00a0234,5")
    '-1 234,5'
    """
    if not cell.isascii():
        cell = "".join(map(_ascii, cell.translate(OTHER_MARKS)))
    return re.sub(r"^([+-])\s+", r"\1", " ".join(cell.split()))


def without_unit(text: str, unit: str) -> str:
    """Remove a unit before or after a number.

    >>> without_unit("-$5", "$"), without_unit("5 mg", "mg")
    ('-5', '5')
    """
    if not unit:
        return text
    sign = text[:1] if text[:1] in ("+", "-") else ""
    return sign + text.removeprefix(sign).strip().removesuffix(unit).removeprefix(unit).strip()


def _ascii(letter: str) -> str:
    """Return the usual form of a letter and of a digit of any script. A superscript stays, because it is no digit."""
    category = unicodedata.category(letter)
    if category == "Nd":
        return str(unicodedata.decimal(letter))
    return letter if category == "No" else unicodedata.normalize("NFKC", letter)


def _days(moment: datetime) -> float:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - EPOCH).total_seconds() / SECONDS_PER_DAY


def _plain_numbers(cells_N: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the result of `parse_column` for a column of plain numbers in one step, or None for other columns."""
    cells = cells_N.tolist()
    missing = {cell for cell in set(cells) if is_missing(cell)}
    missing_N = np.array([cell in missing for cell in cells], bool) if missing else np.zeros(len(cells), bool)
    try:
        values_N = np.where(missing_N, math.nan, cells_N).astype(np.float64)
    except ValueError:
        return None
    is_plain = (np.isfinite(values_N) | missing_N).all() and "_" not in "".join(map(str, cells_N[~missing_N]))
    return (values_N, np.zeros(len(cells_N), bool)) if is_plain else None


def _parse(parse: Callable[[str], float | None], cells_N: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Parse each distinct cell once."""
    parsed: dict[Any, float | None] = {None: math.nan}
    for cell in cells_N:
        if cell not in parsed:
            parsed[cell] = parse(cell) if isinstance(cell, str) else float(cell)
    values = [parsed[cell] for cell in cells_N]
    invalid_N = np.array([value is None for value in values], bool)
    return np.array([math.nan if value is None else value for value in values], np.float64), invalid_N
