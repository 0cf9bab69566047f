"""Compute statistics of columns over all clients, as sums of one contribution per client.

A numeric column has the number of values, their sum and the sum of their squares. A column of categories has the count
of each category. Mean, variance, share of missing values and frequencies of all clients follow from these sums. No
example leaves a client.

Disclosure: exact sums of one client reveal its means, deviations and category counts to their receiver. With a single
example, they reveal the example. With secure aggregation, only the sums over all clients would be visible. With
`Noise`, each client adds noise to its own sums. Each of its records is then protected by differential privacy, at the
cost of one privacy event per client.

Shapes: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain

import numpy as np

from fedlearn.core.privacy_ledger import Event, Ledger
from fedlearn.core.random import Purpose, generator, secret_normals
from fedlearn.data.levels import to_categories
from fedlearn.data.tables import Table, to_numbers
from fedlearn.errors import DataError, is_number, require


@dataclass(frozen=True)
class ColumnSums:
    """Hold the sums of clients for one column.

    Args:
        num_rows: number of rows, including missing values.
        num_present: number of values that are not missing; 0 for a column of categories, where ``counts`` has them.
        total: sum of the values. Fractions keep the digits of a large offset with a small spread.
        sum_squares: sum of the squared values, also without rounding error.
        counts: number of rows of each category.
    """

    num_rows: float = 0.0
    num_present: float = 0.0
    total: Fraction | float = Fraction(0)
    sum_squares: Fraction | float = Fraction(0)
    counts: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: ColumnSums) -> ColumnSums:
        counts = {
            name: self.counts.get(name, 0) + other.counts.get(name, 0) for name in {**self.counts, **other.counts}
        }
        totals = (self.num_rows + other.num_rows, self.num_present + other.num_present)
        return ColumnSums(
            *totals, self.total + other.total, self.sum_squares + other.sum_squares, dict(sorted(counts.items()))
        )

    @property
    def mean(self) -> float:
        """Mean of the values that are not missing; 0 if all are missing."""
        return float(Fraction(self.total) / Fraction(self.num_present)) if self.num_present > 0 else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the values that are not missing; 1 if they are constant, to allow a division.

        Values are constant if they differ only by the rounding of float64, relative to their mean.
        """
        if self.num_present <= 0:
            return 1.0
        std = _sqrt(_variance(Fraction(self.total), Fraction(self.sum_squares), Fraction(self.num_present)))
        return std if std > CONSTANT_SPREAD * abs(self.mean) else 1.0


Statistics = Mapping[str, ColumnSums]
CONSTANT_SPREAD = 2.0**-52  # spread of equal values that were rounded, relative to their mean
SPLITTER = 2.0**27 + 1  # splits a float64 into two halves whose product is exact


def exact_sum(values_N: np.ndarray) -> Fraction:
    """Return the sum of values without rounding error.

    >>> float(exact_sum(np.array([1e16, 1.0, -1e16])))
    1.0
    """
    values, parts = values_N.tolist(), [math.fsum(values_N)]
    while rest := math.fsum(chain(values, (-part for part in parts))):
        parts.append(rest)
    return sum(map(Fraction, parts), Fraction(0))


def exact_sum_of_squares(values_N: np.ndarray) -> Fraction:
    """Return the sum of squares without rounding error. Each square is the sum of two floats.

    Reference: Dekker, *A floating-point technique for extending the available precision*, Numerische Mathematik, 1971.
    """
    exponent = math.frexp(float(np.abs(values_N).max(initial=0.0)))[1]
    scaled_N = np.ldexp(values_N, -exponent)  # the squares of very small numbers would be 0
    high_N = SPLITTER * scaled_N - (SPLITTER * scaled_N - scaled_N)
    low_N, square_N = scaled_N - high_N, scaled_N**2
    error_N = ((high_N**2 - square_N) + 2 * high_N * low_N) + low_N**2
    return exact_sum(np.concatenate([square_N, error_N])) * Fraction(4) ** exponent


def _variance(total: Fraction, sum_squares: Fraction, count: Fraction) -> Fraction:
    return max(Fraction(0), sum_squares / count - (total / count) ** 2)


def _sqrt(value: Fraction) -> float:
    """Return the square root of a fraction, also of one that is too small or too large for a float64."""
    exponent = (value.numerator.bit_length() - value.denominator.bit_length()) // 2
    return math.ldexp(math.sqrt(float(value / Fraction(4) ** exponent)), exponent)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Describe Gaussian noise on the sums of each client, so that each of its records has differential privacy.

    Args:
        multiplier: standard deviation divided by the sensitivity, > 0.
        bounds: (minimum, maximum) of each numeric column; values beyond are clipped. The bounds are public, so they
            must follow from the possible values, not from the data.
        categories: possible values of each other column; other values count as missing.
        seed: seed of the noise in a simulation; None takes the operating system's generator, as real nodes must.

    Reference: Dwork, Roth, *The Algorithmic Foundations of Differential Privacy*, 2014, appendix A.
    """

    multiplier: float
    bounds: Mapping[str, tuple[float, float]]
    categories: Mapping[str, tuple[str, ...]]
    seed: int | None = None

    def __post_init__(self) -> None:
        is_positive = is_number(self.multiplier, at_least=0) and 0 < self.multiplier < math.inf
        require(is_positive, "multiplier", self.multiplier, "a finite number > 0", "multiplier=1.0")
        for column, (least, most) in self.bounds.items():
            is_ordered = is_number(least) and is_number(most) and least < most
            require(
                is_ordered,
                f"bounds.{column}",
                (least, most),
                "two numbers, the smaller first",
                f"bounds.{column}=[0, 1]",
            )

    @property
    def sensitivity(self) -> float:
        """Largest L2 change of the released, scaled numbers when one record is added or removed.

        A record adds 1 to the number of rows. To each numeric column it adds at most (1, z, z^2) with z in [-1, 1]. To
        each other column it adds 1 to one category.
        """
        return math.sqrt(1 + 3 * len(self.bounds) + len(self.categories))

    def initial_ledger(self, clients: Iterable[int]) -> Ledger:
        """Return the privacy ledger at the start of a run: one event per client for the release of its statistics.

        The event protects one record against addition or removal. It therefore composes with the events of
        ``privacy=example``.

        Args:
            clients: ids of the clients that released statistics.
        """
        return Ledger().charge_clients({client: (Event(self.multiplier), 1) for client in clients})


def column_sums(table: Table, *, noise: Noise | None = None) -> dict[str, ColumnSums]:
    """Return the sums of one client for each column.

    Without noise, a column is numeric if it holds numbers at all clients. With noise, ``noise.bounds`` names the
    numeric columns.

    Args:
        table: rows of the client.
        noise: names the kind of each column and the bounds of its values; `add_noise` adds the noise later.
    """
    return {name: _sums_of_column(name, cells_N, noise) for name, cells_N in table.columns.items()}


def add_sums(parts: Iterable[Statistics]) -> dict[str, ColumnSums]:
    """Return the sums over all clients.

    Args:
        parts: statistics of each client, from `column_sums` or `add_noise`.

    *Guarantees*: the order of clients does not matter, up to the rounding of float64 sums.

    Raises:
        DataError: there is no client, or the clients have different columns.
    """
    total: dict[str, ColumnSums] = {}
    for part in parts:
        if total and total.keys() != part.keys():
            raise DataError(
                "the statistics of clients have different columns\n  advice    the same columns at each client"
            )
        total = {name: total.get(name, ColumnSums()) + sums for name, sums in part.items()}
    if not total:
        raise DataError(
            "federated statistics need at least one client, but there is no client\n  try       scale=constants"
        )
    return total


def add_noise(part: Statistics, noise: Noise, *, client: int = 0) -> dict[str, ColumnSums]:
    """Return the statistics of a client with noise; `Noise.initial_ledger` has the privacy cost.

    Args:
        part: statistics from `column_sums` with the same noise.
        noise: amount of noise, bounds and categories.
        client: id of the client; the noise of a simulation is derived from it.

    *Guarantees*: a record changes each released number by at most 1, see `Noise.sensitivity`. The conversion back to
    the units of the column does not depend on data, so noisy parts can be added.

    Raises:
        DataError: a column has neither bounds nor categories, or the table has no column of that name.
    """
    if part.keys() != {*noise.bounds, *noise.categories}:
        stray = sorted(part.keys() ^ {*noise.bounds, *noise.categories})[0]
        fix = f"'scenario.bounds={{{stray}:[MINIMUM,MAXIMUM]}}' or its categories, for an existing column"
        raise DataError(
            f"column {stray} needs bounds or categories, because its statistics get noise\n  advice    {fix}"
        )
    std = noise.multiplier * noise.sensitivity
    step = 2.0 ** (math.floor(math.log2(std)) - 20)  # float gaps must not reveal the sum, see gaussian_noise.py
    draws = _draws(noise, 1 + sum(3 if name in noise.bounds else len(noise.categories[name]) for name in part), client)

    def release(value: float) -> float:
        return round((value + std * next(draws)) / step) * step

    rows = release(next(iter(part.values())).num_rows)
    noisy: dict[str, ColumnSums] = {}
    for name, sums in part.items():
        if name in noise.bounds:
            noisy[name] = _moments(sums, noise.bounds[name], rows, release)
        else:
            noisy[name] = ColumnSums(rows, counts={c: release(sums.counts.get(c, 0)) for c in noise.categories[name]})
    return noisy


def project_to_bounds(statistics: Statistics, noise: Noise) -> dict[str, ColumnSums]:
    """Return noisy sums of all clients, changed to sums that values within the bounds can have.

    Args:
        statistics: noisy sums over all clients.
        noise: the noise of these sums, with the bounds.
    """
    projected: dict[str, ColumnSums] = {}
    for name, sums in statistics.items():
        rows, counts = max(0.0, sums.num_rows), {value: max(0.0, count) for value, count in sums.counts.items()}
        if name in noise.bounds:
            (least, most), present = noise.bounds[name], max(1.0, sums.num_present)
            mean = min(most, max(least, float(Fraction(sums.total) / Fraction(present))))
            max_variance = ((most - least) / 2) ** 2
            square = float(Fraction(sums.sum_squares) / Fraction(present) - Fraction(mean) ** 2)
            variance = Fraction(min(max_variance, max(1e-6 * max_variance, square)))
            total, squares = Fraction(present) * Fraction(mean), Fraction(present) * (variance + Fraction(mean) ** 2)
            projected[name] = ColumnSums(rows, present, total, squares)
        else:
            projected[name] = ColumnSums(rows, counts=counts)
    return projected


def _sums_of_column(name: str, cells_N: np.ndarray, noise: Noise | None) -> ColumnSums:
    numeric = cells_N.dtype != object if noise is None else name in noise.bounds
    if not numeric:
        known = None if noise is None else noise.categories.get(name, ())
        present = [cell for cell in to_categories(cells_N) if cell is not None and (known is None or cell in known)]
        counts = dict(zip(*np.unique(np.array(present, str), return_counts=True), strict=True)) if present else {}
        return ColumnSums(num_rows=len(cells_N), counts={str(value): float(count) for value, count in counts.items()})
    values_N, _ = to_numbers(cells_N)
    present_N = values_N[~np.isnan(values_N)]
    if noise is not None:
        present_N = np.clip(present_N, *noise.bounds[name])
    return ColumnSums(
        num_rows=len(cells_N),
        num_present=len(present_N),
        total=exact_sum(present_N),
        sum_squares=exact_sum_of_squares(present_N),
    )


def _moments(
    sums: ColumnSums, bounds: tuple[float, float], rows: float, release: Callable[[float], float]
) -> ColumnSums:
    """Release moments of z = (value - centre) / half in [-1, 1]; return them in the units of the column."""
    least, most = map(Fraction, bounds)
    centre, half = (least + most) / 2, (most - least) / 2
    count, sum_v, sum_vv = Fraction(sums.num_present), Fraction(sums.total), Fraction(sums.sum_squares)
    sum_z = float((sum_v - centre * count) / half)
    sum_zz = float((sum_vv - 2 * centre * sum_v + centre**2 * count) / half**2)
    present = release(sums.num_present)
    total = half * Fraction(release(sum_z)) + centre * Fraction(present)
    squares = half**2 * Fraction(release(sum_zz)) + 2 * centre * total - centre**2 * Fraction(present)
    return ColumnSums(rows, present, total, squares)


def _draws(noise: Noise, count: int, client: int) -> Iterator[float]:
    if noise.seed is None:
        return iter(secret_normals((count,)).tolist())
    return iter(generator(noise.seed, Purpose.STATISTICS, client=client).standard_normal(count).tolist())
