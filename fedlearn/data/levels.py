"""Compare the values of categories, classes and clients. They stay text as in the file.

The text ``1.0`` equals ``1``, because pandas writes whole numbers so beside missing cells. All other texts are equal
only if they are the same: ``007`` is not ``7``, and ``1e5`` is not ``100000``.

Shapes: N cells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlearn.data.cell_formats import is_missing

WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,14})\.0")
PLAIN_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?")
BOOLEANS = ("true", "false")
NULL = "null"
MISSING_LEVEL, UNKNOWN = -1, -2  # numbers of a missing cell, and of a cell that is no level


def to_category(cell: Any) -> str:
    """Return a value as the text by which categories are compared.

    >>> [to_category(cell) for cell in (1.0, "1.0", "007", "1e5", True, "TRUE", None, "None", 10**18)]
    ['1', '1', '007', '1e5', 'true', 'true', 'null', 'None', '1000000000000000000']
    """
    if cell is None:
        return NULL
    if isinstance(cell, bool | np.bool_):
        return BOOLEANS[not cell]
    if isinstance(cell, float | np.floating):
        return f"{cell:.15g}"
    text = str(cell)
    if text.lower() in BOOLEANS:
        return text.lower()
    return text[:-2] if WHOLE.fullmatch(text) else text


def to_categories(cells_N: np.ndarray, levels: Sequence[str] = ()) -> np.ndarray:
    """Return a column as text, with None for missing cells.

    Args:
        cells_N: text or None, or numbers.
        levels: texts that are values although they are words for missing cells, e.g. ``None``.

    >>> to_categories(np.array(["1.0", "NA", None], object)), to_categories(np.array(["NA"], object), ["NA"])
    (array(['1', None, None], dtype=object), array(['NA'], dtype=object))
    """
    known = {None: None} | {level: level for level in levels}
    column_N = np.empty(len(cells_N), object)
    for place, cell in enumerate(cells_N.tolist()):
        if cell not in known:
            known[cell] = None if is_missing(cell) else to_category(cell)
        column_N[place] = known[cell]
    return column_N


def level_numbers(cells_N: np.ndarray, levels: Sequence[str], *, missing: tuple[str, ...] | None = None) -> np.ndarray:
    """Return the number of the level of each cell, ``(N,)`` int64; -1 for a missing cell, -2 for an unknown level.

    A cell is compared as it is, then by `to_category`, then by its number, if only one level has this number.

    Args:
        cells_N: text or None, or numbers.
        levels: possible values.
        missing: cells that count as missing; None takes the usual words, e.g. ``NA``.

    >>> level_numbers(np.array(["b", "1.50", None, "x"], object), ["1.5", "b"]).tolist()
    [1, 0, -1, -2]
    """
    exact = {level: number for number, level in enumerate(levels)}
    equal = {to_category(level): number for level, number in exact.items()}
    values = [_number(level) for level in levels]
    by_value = {value: number for number, value in enumerate(values) if value is not None and values.count(value) == 1}

    def number_of(cell: Any) -> int:
        if cell in exact:
            return exact[cell]
        if is_missing(cell, missing):
            return MISSING_LEVEL
        text = to_category(cell)
        value = _number(text)
        return equal.get(text, UNKNOWN if value is None else by_value.get(value, UNKNOWN))

    known = {cell: number_of(cell) for cell in set(cells_N.tolist())}
    return np.array([known[cell] for cell in cells_N.tolist()], np.int64)


def _number(text: str) -> float | None:
    value = float(text) if PLAIN_NUMBER.fullmatch(text) else math.nan
    return None if math.isnan(value) else value
