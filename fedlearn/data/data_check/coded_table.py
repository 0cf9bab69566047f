"""Code the columns of a table as indices of their distinct values, for fast counts by site.

Shapes: N rows, L distinct values, S sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedlearn.data.data_check.settings import CheckSettings
from fedlearn.data.levels import to_category
from fedlearn.data.tables import Table, to_numbers

MAX_CLASSES = 20  # distinct whole numbers of a target with classes


@dataclass(frozen=True, kw_only=True)
class CodedColumn:
    """Hold a column as indices of its distinct values.

    Args:
        name: name of the column.
        codes_N: index of the value of each cell; -1 for a missing cell.
        values_L: distinct values: floats, or text.
    """

    name: str
    codes_N: np.ndarray
    values_L: np.ndarray

    @cached_property
    def numbers(self) -> np.ndarray:
        """Distinct values as floats; NaN for text that is not a number."""
        return to_numbers(self.values_L)[0]

    @cached_property
    def is_number(self) -> np.ndarray:
        """Mask of the distinct values that are finite numbers."""
        return np.isfinite(self.numbers)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Distinct values as text, in canonical form."""
        return tuple(map(to_category, self.values_L.tolist()))

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of cells of each value."""
        return np.bincount(self.codes_N[self.present], minlength=len(self.values_L))

    @cached_property
    def present(self) -> np.ndarray:
        """Mask of the cells that are not missing."""
        return self.codes_N >= 0

    @cached_property
    def cell_numbers(self) -> np.ndarray:
        """Cells as floats; NaN for a missing cell, and for text that is not a number."""
        return np.append(self.numbers, math.nan)[self.codes_N]

    @property
    def num_present(self) -> int:
        """Number of cells that are not missing."""
        return int(self.present.sum())

    @cached_property
    def is_numeric(self) -> bool:
        """True if the run reads the cells as numbers, and the column has values."""
        return self.values_L.dtype != object and bool(len(self.values_L))

    @cached_property
    def is_whole(self) -> bool:
        """True if the column is numeric and all numbers are whole."""
        return self.is_numeric and bool((self.numbers == np.rint(self.numbers)).all())

    def counts_by_site(self, site_N: np.ndarray, num_sites: int) -> np.ndarray:
        """Return the number of cells of each value at each site ``(S, L)``."""
        width = max(1, len(self.values_L))
        flat = site_N[self.present] * width + self.codes_N[self.present]
        return np.bincount(flat, minlength=num_sites * width).reshape(num_sites, width)[:, : len(self.values_L)]


@dataclass(frozen=True, kw_only=True)
class CodedTable:
    """Hold the coded columns of a table, its sites, and the role of each column.

    Args:
        columns: columns by name, in the order of the file.
        settings: settings of the check.
        taken_as: role or kind of each column in training.
        sites: names of the sites.
        site_N: index of the site of each row.
        locations: file and row of each row, for messages.
        rows_N: place of each row in the whole table.
        origin: the whole table.
        wrong: text of the cells that differ from the format of their column; None for all other cells.
        digest: digests of images, by which rows are compared; None compares the columns.
        split_N: index of the split of each row in the names of files; None without a split.
    """

    columns: Mapping[str, CodedColumn]
    settings: CheckSettings
    taken_as: Mapping[str, str]
    sites: tuple[str, ...]
    site_N: np.ndarray
    rows_N: np.ndarray
    origin: Table
    wrong: Mapping[str, np.ndarray] = field(default_factory=dict)
    digest: CodedColumn | None = None
    split_N: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        """Number of the rows that are checked."""
        return len(self.site_N)

    @property
    def num_sites(self) -> int:
        """Number of sites, which is 1 without clients."""
        return len(self.sites)

    @cached_property
    def rows_by_site(self) -> np.ndarray:
        """Number of rows of each site ``(S,)``."""
        return np.bincount(self.site_N, minlength=self.num_sites)

    @cached_property
    def target(self) -> CodedColumn | None:
        """Column of the target; None without a target, and for several targets."""
        targets = self.of_kind("target")
        return targets[0] if len(targets) == 1 else None

    @cached_property
    def is_regression(self) -> bool:
        """True if the target is a number that is no class."""
        if self.target is None or self.settings.task is not None:
            return self.settings.task == "regression"
        return self.target.is_numeric and not (self.target.is_whole and len(self.target.values_L) <= MAX_CLASSES)

    def of_kind(self, *kinds: str) -> list[CodedColumn]:
        """Return the columns that are taken as one of these kinds."""
        return [column for name, column in self.columns.items() if self.taken_as[name] in kinds]

    def location(self, row: int) -> str:
        """Return the file and row number of a checked row."""
        return self.origin.row_location(int(self.rows_N[row]))

    def names(self, site_S: np.ndarray) -> tuple[str, ...]:
        """Return the names of the sites of a mask or of indices."""
        indices = np.flatnonzero(site_S) if site_S.dtype == bool else site_S
        return tuple(self.sites[index] for index in indices)


def code_column(name: str, cells_N: np.ndarray) -> CodedColumn:
    """Return the column with its distinct values: numbers in order, text by first appearance.

    >>> code_column("sex", np.array(["f", None, "m", "f"], object)).codes_N.tolist()
    [0, -1, 1, 0]
    """
    if cells_N.dtype != object:
        return _code_numbers(name, np.asarray(cells_N, np.float64))
    index: dict[object, int] = {}
    codes_N = np.array([-1 if cell is None else index.setdefault(cell, len(index)) for cell in cells_N], np.int64)
    values_L = np.empty(len(index), object)
    values_L[:] = list(index)
    return CodedColumn(name=name, codes_N=codes_N, values_L=values_L)


def _code_numbers(name: str, numbers_N: np.ndarray) -> CodedColumn:
    present_N = ~np.isnan(numbers_N)
    codes_N = np.full(len(numbers_N), -1, np.int64)
    values_L, codes_N[present_N] = np.unique(numbers_N[present_N], return_inverse=True)
    return CodedColumn(name=name, codes_N=codes_N, values_L=values_L)


def sample_rows(site_N: np.ndarray, num_sites: int, max_rows: int) -> np.ndarray:
    """Return the places of at most about ``max_rows`` rows, evenly spread over each site, in ascending order."""
    if len(site_N) <= max_rows:
        return np.arange(len(site_N))
    at_least = max(1, min(200, max_rows // (2 * num_sites)))
    order_N = np.argsort(site_N, kind="stable")
    parts = np.split(order_N, np.cumsum(np.bincount(site_N, minlength=num_sites))[:-1])
    chosen = []
    for rows_k in parts:
        count = min(len(rows_k), max(at_least, round(len(rows_k) * max_rows / len(site_N))))
        chosen.append(rows_k[np.linspace(0, len(rows_k) - 1, count).astype(int)] if count else rows_k)
    return np.sort(np.concatenate(chosen))
