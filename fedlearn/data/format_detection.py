"""Detect the format of a column of text: numbers, dates, or text such as categories and codes.

One format applies to a whole column. A column in which two formats are possible is not guessed.

Shapes: N cells.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlearn.data.cell_formats import PLAIN, CellFormat, DateFormat, NumberFormat, normalized

CODE = re.compile(r"^(0[0-9]+|[0-9]{16,})$", re.MULTILINE)  # leading zeros, or more digits than a float64 has
EXPONENT_CODE = re.compile(r"[0-9]+([eE][0-9]{1,2})?")  # 10E2: programs write a number as 1e+05 or 1.0e5
DATE_SHAPE = re.compile(
    r"[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}(?![0-9]).*|[0-9]{1,2}[- ][A-Za-z]{3,9}\.?[- ][0-9]{4}|"
    r"[A-Za-z]{3,9} [0-9]{1,2}, [0-9]{4}|[0-9]{1,2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?|[0-9]{4}[-/][0-9]{1,2}"
)
DAYS = ("%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%d.%m.%y", "%d/%m/%y",
        "%m/%d/%y", "%d-%m-%y", "%m-%d-%y", "%Y-%m-%d", "%d %b %Y", "%d-%b-%Y", "%d %B %Y", "%d-%B-%Y", "%b %d, %Y",
        "%B %d, %Y")  # fmt: skip
TIMES = ("", " %H:%M", " %H:%M:%S", "T%H:%M", "T%H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p")
OTHER_DATES = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%Y-%m", "%Y/%m")
MARKS = ((".", ""), (",", ""), (".", ","), (",", "."), (".", " "), (",", " "), (".", "'"), (",", "'"))
NUMBER_FORMATS = tuple(NumberFormat(decimal=decimal, thousands=thousands) for decimal, thousands in MARKS)
NUMBER = r"(?P<number>[+-]?(?:[0-9][0-9.,' ]*|[.,][0-9]+)(?:[eE][+-]?[0-9]+)?)"
CURRENCY = r"[€$£¥₹₽₩]|EUR|USD|GBP|CHF|JPY|CNY|INR|SEK|NOK|DKK|PLN|CZK|AUD|CAD"
ATOM = (
    r"(?:[kmcdnpfMGμu]?(?:g|[lL]|m|mol|Hz|Pa|[eE]q|[oO]sm|IU|Gy|Sv|Bq|cal|s|V|W|J)|mcg|mmHg|cmH2O|bpm|min|h|hrs?|d|"
    r"days?|wk|weeks?|mo|months?|y|yrs?|years?|hours?|°C|°F|°|K|lbs?|oz|in|ft|IU|U|cells?|copies|%|‰|ppm|ppb|"
    rf"beats|x?10\^?[0-9]+|{CURRENCY})[23²³]?"
)
KNOWN_UNIT = re.compile(rf"{ATOM}(?:[/*·]{ATOM})*")
AMBIGUOUS_UNITS = frozenset("VWJUK")  # a letter directly after a number is rather part of a code, e.g. 12V
WITH_UNIT = re.compile(
    rf"(?P<before>{CURRENCY})? ?{NUMBER}(?P<space> ?)"
    r"(?P<after>[^\W\d_][^\s,;]{0,15}|[%‰°€$£¥₹₽₩][^\s,;]{0,15}|x?10\^[^\s,;]+)?"
)
SIGNED_CURRENCY = re.compile(rf"([+-])({CURRENCY}) ?")
NOT_A_NUMBER = "not a number"
MAX_TRIED = 1000  # distinct cells with which the format of dates is found


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Hold the format of a column, or the cells that prevent a decision.

    Args:
        format: format of numbers or dates; None for text.
        wrong: cells to refuse.
        reason: fault of these cells.
        fix: lines of a schema that decide it.
    """

    format: CellFormat | None = None
    wrong: frozenset[str] = frozenset()
    reason: str = ""
    fix: str = ""


TEXT = Detection()


def detect_format(cells: Sequence[str], *, decimal: str | None = None) -> Detection:
    """Return the format of a column.

    Args:
        cells: distinct cells that are not missing.
        decimal: decimal mark of other columns of the same files; None if it is unknown.
    """
    if not cells:
        return Detection(format=PLAIN)
    if has_codes(cells):
        return _detect_codes(cells)
    if decimal != "," and _are_plain(cells):
        return Detection(format=PLAIN)
    texts = {normalized(cell): cell for cell in cells}
    if CODE.search("\n".join(texts)):
        return TEXT
    dates = [text for text in texts if DATE_SHAPE.fullmatch(text)]
    if 2 * len(dates) > len(texts):
        return _detect_dates(texts, dates)
    return _detect_numbers(texts, decimal)


def has_codes(cells: Sequence[str]) -> bool:
    """Return whether some numbers of a column are codes: with leading zeros, too many digits, or such as 10E2."""
    return CODE.search("\n".join(cells)) is not None or _has_exponent_codes(cells)


def _has_exponent_codes(cells: Sequence[str]) -> bool:
    """Return whether a column has numbers such as 10E2 and no number with a sign or a decimal mark."""
    if not any(EXPONENT_CODE.fullmatch(cell) and not cell.isdigit() for cell in cells):
        return False
    return not any(NUMBER_FORMATS[0].pattern.fullmatch(cell) and not EXPONENT_CODE.fullmatch(cell) for cell in cells)


def _detect_codes(cells: Sequence[str]) -> Detection:
    """Return text, unless cells such as 10E2 are beside whole numbers only, so that they can be numbers too."""
    with_exponent = frozenset(cell for cell in cells if not cell.isdigit())
    are_digits = CODE.search("\n".join(cells)) is None and all(map(EXPONENT_CODE.fullmatch, cells))
    if not are_digits or len(with_exponent) == len(cells):
        return TEXT
    return Detection(
        wrong=with_exponent, reason="a number with an exponent, or a code", fix="{type: category} or {type: number}"
    )


def _are_plain(cells: Sequence[str]) -> bool:
    values_N, invalid_N = PLAIN.parse_column(np.array(cells, object))
    return not invalid_N.any() and not np.isnan(values_N).any()


def _detect_dates(texts: dict[str, str], dates: Sequence[str]) -> Detection:
    sample = dates[:: max(1, len(dates) // MAX_TRIED)]
    tried = ["", *OTHER_DATES, *(day + time for time in TIMES for day in DAYS)]
    likely = [DateFormat(format=text) for text in tried]
    likely = [format for format in likely if any(format.parse(cell) is not None for cell in sample[:20])]
    values = {format: tuple(format.parse(cell) for cell in sample) for format in likely}
    fits = {format: sum(value is not None for value in found) for format, found in values.items()}
    leaders = [format for format in likely if fits[format] == max(fits.values())]
    if not leaders:
        return TEXT
    if len({values[format] for format in leaders}) > 1:
        fix = " or ".join(f'{{type: date, format: "{format.format}"}}' for format in leaders[:2])
        return Detection(wrong=frozenset(texts.values()), reason="a date with two possible meanings", fix=fix)
    wrong = frozenset(cell for cell in texts.values() if leaders[0].parse(cell) is None)
    reason = "not a date in the format of most cells of this column"
    return Detection(
        format=leaders[0], wrong=wrong, reason=reason, fix=f'{{type: date, format: "{leaders[0].format}"}}'
    )


def _detect_numbers(texts: dict[str, str], decimal: str | None) -> Detection:
    """Find the unit, then the marks. Both apply to all cells that have the shape of a number."""
    parts = {text: found for text in texts if (found := _split(text)) is not None}
    if 2 * len(parts) <= len(texts):
        return TEXT
    units = Counter(unit for _, unit in parts.values())
    unit = max(units, key=lambda unit: (units[unit], unit))
    if len(units) > 1 and not all(KNOWN_UNIT.fullmatch(name) or not name for name in units):
        parts = {text: found for text, found in parts.items() if found[1] == ""}
        unit = ""
        if 2 * len(parts) <= len(texts):
            return TEXT
    wrong = {texts[text] for text, (_, other) in parts.items() if other != unit}
    if wrong:
        reason = "a number with another unit than most cells of this column, or without the unit"
        return Detection(wrong=frozenset(wrong), reason=reason, fix="{type: category}")
    detection = _detect_marks({number: texts[text] for text, (number, _) in parts.items()}, decimal)
    if not isinstance(detection.format, NumberFormat):
        return detection
    format = NumberFormat(decimal=detection.format.decimal, thousands=detection.format.thousands, unit=unit)
    others = frozenset(cell for cell in texts.values() if format.parse(cell) is None)
    return Detection(format=format, wrong=others, reason=NOT_A_NUMBER, fix="{type: category}")


def _detect_marks(numbers: dict[str, str], decimal: str | None) -> Detection:
    fits = {format: [number for number in numbers if format.pattern.fullmatch(number)] for format in NUMBER_FORMATS}
    most = max(map(len, fits.values()))
    best = [format for format in NUMBER_FORMATS if len(fits[format]) == most]
    possible = {number for found in fits.values() for number in found}
    if most < len(numbers) and len(possible) == len(numbers):
        wrong = frozenset(cell for number, cell in numbers.items() if number not in fits[best[0]])
        reason = "a number with other decimal or thousands marks than most cells of this column"
        return Detection(wrong=wrong, reason=reason, fix='{type: number, decimal: ","}')
    if 2 * most <= len(numbers):
        return TEXT
    meanings = {tuple(map(format.parse, fits[format])) for format in best}
    if decimal is None and (PLAIN in best or len(meanings) == 1):
        decimal = best[0].decimal
    if decimal is None:  # 1,234 without another number that shows the meaning of the comma
        fix = '{type: number, decimal: ","} or {type: number, thousands: ","}'
        wrong = frozenset(numbers[number] for number in fits[best[0]] if "," in number)
        return Detection(wrong=wrong, reason="a number whose comma is a decimal mark or a thousands mark", fix=fix)
    return Detection(format=next((format for format in best if format.decimal == decimal), best[0]))


def _split(text: str) -> tuple[str, str] | None:
    """Split a cell into the text of a number and its unit. Return None for other text."""
    found = WITH_UNIT.fullmatch(SIGNED_CURRENCY.sub(r"\2\1", text))
    if found is None or (found["before"] and found["after"]):
        return None
    number, after = found["number"].strip(), found["after"] or ""
    is_attached = not found["number"].endswith(" ") and not found["space"]
    if after and is_attached and (after in AMBIGUOUS_UNITS or not KNOWN_UNIT.fullmatch(after)):
        return None
    return number, found["before"] or after
