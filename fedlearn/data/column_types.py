"""Turn one column of a table into features. The kinds of columns are numbers, categories and text.

Shapes: N rows, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from fedlearn.data.cell_formats import PLAIN, TEXT, CellFormat, NumberFormat, TextFormat
from fedlearn.data.levels import UNKNOWN, level_numbers
from fedlearn.data.scripts import text_tokens
from fedlearn.data.tables import Table, to_numbers
from fedlearn.errors import is_count, is_number

Scaling = Literal["linear", "arcsinh", "log1p"]
MAX_LEVELS = 10_000
MAX_TEXT_FEATURES = 2**24


@dataclass(frozen=True, kw_only=True)
class Number:
    """Scale a numeric column to one feature.

    Args:
        name: name of the column.
        centre: value that becomes 0, in the unit of the column.
        spread: change of the value that changes the scaled value by 1; not 0.
        fill: value that replaces a missing cell, in the unit of the column; None refuses a missing cell.
        scaling: ``linear`` is ``(v - centre) / spread``; ``arcsinh`` is the inverse hyperbolic sine of this value;
            ``log1p`` is ``(log(1 + v) - centre) / spread``.
        zero_is_missing: whether 0 is a missing cell.
        equals: value whose indicator (1 or 0) is scaled instead of the value; None scales the value itself.
        largest: largest number of an embedding, which accepts whole numbers from 0; None accepts all numbers.
        format: format of the cells of a text file.

    >>> table = Table({"age": np.array(["60", None], object)}, (("a.csv", 2, 2),))
    >>> Number(name="age", centre=50, spread=10, fill=50).features(table).tolist()
    [[1.0], [0.0]]
    """

    name: str
    centre: float = 0.0
    spread: float = 1.0
    fill: float | None = None
    scaling: Scaling = "linear"
    zero_is_missing: bool = False
    equals: float | None = None
    largest: int | None = None
    format: CellFormat = PLAIN

    def __post_init__(self) -> None:
        _check(isinstance(self.name, str) and bool(self.name), "a column without a name")
        _check(all(map(_is_finite, (self.centre, self.spread))) and self.spread != 0, f"a wrong scale of {self.name}")
        are_numbers = all(value is None or _is_finite(value) for value in (self.fill, self.equals, self.largest))
        _check(are_numbers, f"a wrong number for {self.name}")
        _check(self.scaling in get_args(Scaling), f"a wrong scaling of {self.name}")
        _check(isinstance(self.zero_is_missing, bool), f"a wrong flag of {self.name}")
        _check(isinstance(self.format, CellFormat), f"a wrong format of {self.name}")

    @property
    def num_features(self) -> int:
        """Number of features of this column."""
        return 1

    @property
    def accepts_missing(self) -> bool:
        """True if a missing cell has a replacement."""
        return self.fill is not None

    def features(self, table: Table, *, allow_unknown: bool = False, unknown_fix: str = "") -> np.ndarray:
        """Return the feature ``(N, 1)``.

        Raises:
            DataError: a cell is not a number, or is missing without a replacement; the message names row and column.
        """
        values_N = numeric_column(table, self.name, self.format)
        missing_N = np.isnan(values_N) | (values_N == 0 if self.zero_is_missing else False)
        if self.fill is None:
            fix = "scenario.scale=federated"
            table.refuse(missing_N, self.name, "missing, and the model has no value to replace it", fix)
        else:
            values_N = np.where(missing_N, self.fill, values_N)
        if self.largest is not None:
            is_whole_N = (values_N == np.rint(values_N)) & (values_N >= 0) & (values_N <= self.largest)
            table.refuse(~is_whole_N, self.name, f"not a whole number in 0..{self.largest}", "correct the cell")
        return self._scaled(values_N)[:, None]

    def _scaled(self, values_N: np.ndarray) -> np.ndarray:
        if self.equals is not None:
            values_N = (values_N == self.equals).astype(np.float64)
        if self.scaling == "log1p":
            return np.asarray((np.log1p(values_N) - self.centre) / self.spread)
        linear_N = (values_N - self.centre) / self.spread
        return np.asarray(np.arcsinh(linear_N) if self.scaling == "arcsinh" else linear_N)


@dataclass(frozen=True, kw_only=True)
class Category:
    """Encode a column of categories as one feature for each level; a missing cell is 0 in all of them.

    Args:
        name: name of the column.
        levels: values of the column, see `fedlearn.data.levels`.
        format: format of the cells of a text file.
    """

    name: str
    levels: tuple[str, ...]
    format: TextFormat = TEXT

    def __post_init__(self) -> None:
        _check(isinstance(self.name, str) and bool(self.name), "a column without a name")
        are_texts = isinstance(self.levels, tuple) and all(isinstance(level, str) for level in self.levels)
        _check(are_texts and len(self.levels) <= MAX_LEVELS, f"wrong levels of {self.name}")
        _check(isinstance(self.format, TextFormat), f"a wrong format of {self.name}")

    @property
    def num_features(self) -> int:
        """Number of features of this column."""
        return len(self.levels)

    @property
    def accepts_missing(self) -> bool:
        """True if a missing cell has a replacement."""
        return True

    def features(self, table: Table, *, allow_unknown: bool = False, unknown_fix: str = "") -> np.ndarray:
        """Return the features ``(N, F)``.

        Args:
            table: rows with this column.
            allow_unknown: whether an unknown category counts as missing. If not, it is an error.
            unknown_fix: thing to try after this error; the name of the column replaces ``COLUMN``.

        Raises:
            DataError: a category is unknown; the message names row and column.
        """
        levels_N = level_numbers(table.columns[self.name], self.levels, missing=self.format.missing)
        one_hot_NC = levels_N[:, None] == np.arange(len(self.levels))
        if not allow_unknown:
            unknown_N = levels_N == UNKNOWN
            fix = unknown_fix.replace("COLUMN", self.name)
            table.refuse(unknown_N, self.name, f"not one of the categories {', '.join(self.levels)}", fix)
        return one_hot_NC


@dataclass(frozen=True, kw_only=True)
class HashedText:
    """Count the hashed words of a column of text, as a vector of unit length. No vocabulary is learned.

    `fedlearn.data.scripts.text_tokens` states the words, also for scripts without spaces.

    Args:
        name: name of the column.
        num_features: number of features, >= 1.
    """

    name: str
    num_features: int

    def __post_init__(self) -> None:
        _check(isinstance(self.name, str) and bool(self.name), "a column without a name")
        is_valid = is_count(self.num_features) and self.num_features <= MAX_TEXT_FEATURES
        _check(is_valid, f"a wrong number of features of {self.name}")

    @property
    def accepts_missing(self) -> bool:
        """True if a missing cell has a replacement."""
        return True

    def features(self, table: Table, *, allow_unknown: bool = False, unknown_fix: str = "") -> np.ndarray:
        """Return the features ``(N, F)``; a missing text has zeros."""
        from sklearn.feature_extraction.text import HashingVectorizer

        texts = ["" if cell is None else str(cell) for cell in table.columns[self.name]]
        words = HashingVectorizer(n_features=self.num_features, dtype=np.float32, analyzer=text_tokens)
        hashed = words.transform(texts)
        return np.asarray(hashed.toarray())


Column = Number | Category | HashedText


def numeric_column(table: Table, name: str, format: CellFormat = PLAIN) -> np.ndarray:
    """Return a numeric column as float64, with NaN for missing values.

    Args:
        table: table with the column.
        name: name of the column.
        format: format of the cells, if they are text.

    Raises:
        DataError: a cell is not a number; the message names file, row and column of the first one.
    """
    values_N, invalid_N = to_numbers(table.columns[name], format)
    fix = f"correcting the cell, or 'scenario.categories={{{name}:[...]}}' for a column of categories"
    table.refuse(invalid_N, name, "not a number" if isinstance(format, NumberFormat) else "not a date", fix)
    return values_N


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
