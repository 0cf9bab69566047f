"""A federated statistics round: what preprocessing must know of columns, as sums that each client adds its part to.

For a numeric column: how many values, their sum, the sum of their squares. For one of categories: how many of each. So
mean, variance, share of missing values and frequencies follow, of all clients together, and no example leaves one.

What it reveals: exact sums tell whoever sees a client's own that client's means, deviations and category counts; of a
client with one example they are the example. Under secure aggregation only sums over all clients would be seen. With
`Noise`, which each client adds to its own part, each of its records is protected by differential privacy from everyone
else, which costs the client one event.

Shapes: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedlearn.core.privacy_ledger import Event, Ledger
from fedlearn.core.random import Purpose, generator, secret_normals
from fedlearn.data.tables import Table, to_categories, to_numbers
from fedlearn.errors import DataError, is_number, require


@dataclass(frozen=True)
class ColumnSums:
    """Hold the sums of clients for one column.

    Args:
        num_rows: in all, missing values included.
        num_present: of them not missing; 0 for a column of categories, where it is the sum of ``counts``.
        total: of the values.
        sum_squares: of the values.
        counts: of each category.
    """

    num_rows: float = 0.0
    num_present: float = 0.0
    total: float = 0.0
    sum_squares: float = 0.0
    counts: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: ColumnSums) -> ColumnSums:
        both = {name: self.counts.get(name, 0) + other.counts.get(name, 0) for name in {**self.counts, **other.counts}}
        totals = (self.num_rows + other.num_rows, self.num_present + other.num_present)
        return ColumnSums(
            *totals, self.total + other.total, self.sum_squares + other.sum_squares, dict(sorted(both.items()))
        )

    @property
    def mean(self) -> float:
        """Of the values that are there; 0 where there are none."""
        return self.total / self.num_present if self.num_present > 0 else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the values that are there; 1 where they do not vary, so that one may divide by it."""
        if self.num_present <= 0:
            return 1.0
        variance = self.sum_squares / self.num_present - self.mean**2
        return math.sqrt(variance) if variance > 1e-12 * max(1.0, self.mean**2) else 1.0


Statistics = Mapping[str, ColumnSums]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Gaussian noise on each client's sums, so that they protect each of its records.

    Args:
        multiplier: standard deviation over the sensitivity, > 0.
        bounds: (least, most) of each numeric column; values beyond are moved there. They are public: what a value can
            be, not what it is.
        categories: that each other column can have; others are counted with the missing ones.
        seed: of the noise in a simulation; None takes it from the operating system's generator, as real nodes must.

    Reference: Dwork, Roth, *The Algorithmic Foundations of Differential Privacy*, 2014, appendix A.
    """

    multiplier: float
    bounds: Mapping[str, tuple[float, float]]
    categories: Mapping[str, tuple[str, ...]]
    seed: int | None = None

    def __post_init__(self) -> None:
        ok = is_number(self.multiplier, at_least=0) and 0 < self.multiplier < math.inf
        require(ok, "multiplier", self.multiplier, "a finite number > 0", "multiplier=1.0")
        for column, (least, most) in self.bounds.items():
            ordered = is_number(least) and is_number(most) and least < most
            require(
                ordered, f"bounds.{column}", (least, most), "two numbers, the smaller first", f"bounds.{column}=[0, 1]"
            )

    @property
    def sensitivity(self) -> float:
        """The norm by which adding or removing one record changes what is released, in the units it is released in.

        A record adds 1 to the number of rows; at most (1, z, z^2) with z in [-1, 1] for a numeric column; 1 to one
        category of each other column.
        """
        return math.sqrt(1 + 3 * len(self.bounds) + len(self.categories))

    def initial_ledger(self, clients: Iterable[int]) -> Ledger:
        """What a run starts with that was prepared so: each client has paid for one release of its records.

        The event protects one record under adding or removing it, so it composes with those of ``privacy=example``.
        """
        return Ledger().charge_clients({client: (Event(self.multiplier), 1) for client in clients})


def column_sums(table: Table, *, noise: Noise | None = None) -> dict[str, ColumnSums]:
    """Return the sums of one client: of numbers if a column holds numbers at all clients (`joined`), else of
    categories.

    Args:
        table: the client's rows.
        noise: to say which columns are what, and to move values into their bounds; adds none yet.
    """
    return {name: _of_column(name, cells_N, noise) for name, cells_N in table.columns.items()}


def add_sums(parts: Iterable[Statistics]) -> dict[str, ColumnSums]:
    """All clients' parts together.

    *Guarantees*: the same whatever the order of clients, to rounding of float64 sums.

    Raises:
        DataError: there is no part, or one lacks a column.
    """
    whole: dict[str, ColumnSums] = {}
    for part in parts:
        if whole and whole.keys() != part.keys():
            raise DataError("clients have sums of different columns\n  try       the same columns at every client")
        whole = {name: whole.get(name, ColumnSums()) + of for name, of in part.items()}
    if not whole:
        raise DataError("there is no client to add up statistics of")
    return whole


def add_noise(part: Statistics, noise: Noise, *, client: int = 0) -> dict[str, ColumnSums]:
    """Return the statistics of a client with noise of its own; `Noise.initial_ledger` has the privacy cost.

    Args:
        part: from `column_sums` with this noise.
        noise: how much.
        client: whose; in a simulation its noise follows from its number.

    *Guarantees*: numbers are released in units in which a record changes them by at most 1 each, see
    `Noise.sensitivity`, and brought back to the column's by what does not depend on data: parts still add up.

    Raises:
        DataError: a column has neither bounds nor categories, or one that has is not there.
    """
    if part.keys() != {*noise.bounds, *noise.categories}:
        stray = sorted(part.keys() ^ {*noise.bounds, *noise.categories})[0]
        fix = f"'scenario.bounds={{{stray}:[LEAST,MOST]}}', or its categories, if there is such a column"
        raise DataError(f"column {stray} needs bounds or categories, for columns with noise\n  try       {fix}")
    std = noise.multiplier * noise.sensitivity
    step = 2.0 ** (math.floor(math.log2(std)) - 20)  # gaps between floats must not tell what was added, see noise.py
    draws = _draws(noise, 1 + sum(3 if name in noise.bounds else len(noise.categories[name]) for name in part), client)

    def release(value: float) -> float:
        return round((value + std * next(draws)) / step) * step

    rows = release(next(iter(part.values())).num_rows)
    made: dict[str, ColumnSums] = {}
    for name, of in part.items():
        if name in noise.bounds:
            made[name] = _moments(of, noise.bounds[name], rows, release)
        else:
            made[name] = ColumnSums(rows, counts={c: release(of.counts.get(c, 0)) for c in noise.categories[name]})
    return made


def project_to_bounds(statistics: Statistics, noise: Noise) -> dict[str, ColumnSums]:
    """Noisy sums of all clients, made to be some that columns within these bounds can have."""
    made: dict[str, ColumnSums] = {}
    for name, of in statistics.items():
        rows, counts = max(0.0, of.num_rows), {value: max(0.0, count) for value, count in of.counts.items()}
        if name in noise.bounds:
            (least, most), present = noise.bounds[name], max(1.0, of.num_present)
            mean = min(most, max(least, of.total / present))
            largest = ((most - least) / 2) ** 2  # that a variance can be
            variance = min(largest, max(1e-6 * largest, of.sum_squares / present - mean**2))
            made[name] = ColumnSums(rows, present, present * mean, present * (variance + mean**2))
        else:
            made[name] = ColumnSums(rows, counts=counts)
    return made


def _of_column(name: str, cells_N: np.ndarray, noise: Noise | None) -> ColumnSums:
    numeric = cells_N.dtype != object if noise is None else name in noise.bounds
    if not numeric:
        known = None if noise is None else noise.categories.get(name, ())
        there = [cell for cell in to_categories(cells_N) if cell is not None and (known is None or cell in known)]
        counts = dict(zip(*np.unique(np.array(there, str), return_counts=True), strict=True)) if there else {}
        return ColumnSums(num_rows=len(cells_N), counts={str(value): float(count) for value, count in counts.items()})
    values_N, _ = to_numbers(cells_N)
    there_N = values_N[~np.isnan(values_N)]
    if noise is not None:
        there_N = np.clip(there_N, *noise.bounds[name])
    total, squares = math.fsum(there_N), math.fsum(there_N**2)
    return ColumnSums(num_rows=len(cells_N), num_present=len(there_N), total=total, sum_squares=squares)


def _moments(of: ColumnSums, bounds: tuple[float, float], rows: float, release: Callable[[float], float]) -> ColumnSums:
    """Moments of z = (value - centre) / half, which is in [-1, 1], released and brought back to the column's units."""
    centre, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
    sum_z = (of.total - centre * of.num_present) / half
    sum_zz = (of.sum_squares - 2 * centre * of.total + centre**2 * of.num_present) / half**2
    present = release(of.num_present)
    total = half * release(sum_z) + centre * present
    squares = half**2 * release(sum_zz) + 2 * centre * total - centre**2 * present
    return ColumnSums(rows, present, total, squares)


def _draws(noise: Noise, count: int, client: int) -> Iterator[float]:
    if noise.seed is None:
        return iter(secret_normals((count,)).tolist())
    return iter(generator(noise.seed, Purpose.STATISTICS, client=client).standard_normal(count).tolist())
