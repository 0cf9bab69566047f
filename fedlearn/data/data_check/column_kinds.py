"""Recognize the content of a column: numbers, categories, dates, identifiers or free text.

Shapes: N rows, L distinct values.
"""

from __future__ import annotations

import re

import numpy as np

from fedlearn.data.data_check.coded_table import CodedColumn

MIN_ROWS = 20  # fewer rows are not enough for a statement about distinct values
SHARE_DISTINCT = 0.95  # distinct values of an identifier, relative to its cells
SHARE_OF_PATTERN = 0.9  # distinct values that match a pattern
NUM_TESTED = 500  # distinct values that are matched with a pattern
MIN_TOKENS = 3  # mean number of tokens in free text
DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})( .*)?"
    r"|\d{1,2}[ -][A-Za-z]{3,9}\.?[ -]\d{2,4}( .*)?|[A-Za-z]{3,9}\.? \d{1,2}, \d{4}|\d{4}年\d{1,2}月(\d{1,2}日)?"
)
NAME_OF_IDENTIFIER = re.compile(
    r"(^|[^a-z])(u?id|uuid|guid|index|idx|nr|no|num|mrn|ssn|key|barcode)([^a-z]|$)|_?id$|^id_?|^unnamed"
    r"|(patient|record|case|subject|sample|stay|encounter|customer|account|row|serial)s?"
    r"[ _-]*(no|nr|num|number|code|key)?$"
)
NAME_OF_DATE = re.compile(
    r"date|time|datum|day|stamp|birth|admission|admitted|discharge|visit|created|updated|year|jahr|zeit|fecha"
)
UNIX_SECONDS = (3e8, 4e9)  # 1979 to 2096
COMPACT_DATES = (19_000_101, 21_001_231)  # numbers such as 20260131


def matches(column: CodedColumn, pattern: re.Pattern[str]) -> bool:
    """Return whether nearly all of the distinct values match a pattern."""
    texts = [str(value) for value in column.values_L[:NUM_TESTED]]
    return bool(texts) and sum(bool(pattern.fullmatch(text)) for text in texts) >= SHARE_OF_PATTERN * len(texts)


def is_date(column: CodedColumn) -> bool:
    """Return whether a column holds dates: as text, as numbers such as 20260131, or as Unix seconds."""
    if not column.is_numeric:
        return matches(column, DATE)
    if not column.is_whole or len(column.values_L) < 2:
        return False
    low, high = column.numbers[[0, -1]]
    if COMPACT_DATES[0] <= low and high <= COMPACT_DATES[1]:
        month_L, day_L = column.numbers // 100 % 100, column.numbers % 100
        return bool(((month_L >= 1) & (month_L <= 12) & (day_L >= 1) & (day_L <= 31)).all())
    scales = (1, 1e3, 1e6, 1e9)  # seconds, milliseconds, microseconds, nanoseconds
    in_range = any(UNIX_SECONDS[0] * scale <= low and high <= UNIX_SECONDS[1] * scale for scale in scales)
    return in_range and bool(NAME_OF_DATE.search(column.name.lower()))


def is_identifier(column: CodedColumn) -> bool:
    """Return whether a column identifies rows or persons: nearly all cells differ, and are no measurements."""
    num_present, num_distinct = column.num_present, len(column.values_L)
    if num_present < MIN_ROWS:
        return False
    is_distinct = num_distinct >= SHARE_DISTINCT * num_present
    is_named = bool(NAME_OF_IDENTIFIER.search(column.name.lower()))
    if not column.is_numeric:
        return is_distinct or (is_named and 2 * num_distinct > num_present)
    if not column.is_whole:
        return False
    span = float(column.numbers[-1] - column.numbers[0]) + 1
    is_count = is_distinct and span <= 1.1 * num_present and num_distinct == num_present
    has_long_numbers = is_distinct and float(np.median(np.abs(column.numbers))) >= 1e7
    return is_count or has_long_numbers or (is_named and 3 * num_distinct > num_present)


def is_free_text(column: CodedColumn) -> bool:
    """Return whether a column holds sentences: several words in most distinct values, and many of them."""
    texts = [str(value) for value in column.values_L[:NUM_TESTED]]
    if column.is_numeric or len(texts) < 10:
        return False
    num_words = [len(text.split()) for text in texts]
    return float(np.mean(num_words)) >= MIN_TOKENS and 10 * len(column.values_L) > column.num_present
