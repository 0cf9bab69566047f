"""How columns are scaled and filled in: by constants, or by what a federated statistics round finds.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlearn.data.encode import Encoding, as_it_is, declared, found
from fedlearn.data.statistics import Noise, add, column_sums, noisy, settled
from fedlearn.data.tables import Table, rows_of
from fedlearn.errors import did_you_mean, require
from fedlearn.privacy.ledger import Ledger

SCALES = ("federated", "constants", "none")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What was asked for.

    Args:
        scale: ``federated``, ``constants`` or ``none``.
        scales: column -> (centre, spread), of ``constants``.
        categories: column -> its values.
        noise: on the statistics of ``federated``; None: exact.
    """

    scale: str
    scales: Mapping[str, Sequence[float]] = field(default_factory=dict)
    categories: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    noise: Noise | None = None

    def __post_init__(self) -> None:
        near = did_you_mean(str(self.scale), SCALES) or "federated"
        require(self.scale in SCALES, "scale", self.scale, f"one of {', '.join(SCALES)}", f"scale={near}")
        fits = self.noise is None or self.scale == "federated"
        expected = "null where no statistics are taken"
        require(fits, "noise_multiplier", self.noise and self.noise.multiplier, expected, "scale=federated")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """How columns become numbers, and what it took to find out.

    Args:
        encoding: of the columns.
        said: for the header.
        told: what clients have told, in words; empty for nothing.
        ledger: what each client has paid for that.
    """

    encoding: Encoding = field(default_factory=lambda: Encoding(scales={}, categories={}))
    said: str = ""
    told: str = ""
    ledger: Ledger = field(default_factory=Ledger)


def prepare(table: Table, train: Sequence[np.ndarray], how: Preparation, *, whole: bool) -> Prepared:
    """Decide how columns become numbers.

    Args:
        table: of all rows that are here.
        train: the training rows of each client; no others are looked at for statistics.
        how: what was asked for.
        whole: whether all clients' rows are here, which a statistics round needs.

    Raises:
        SettingError: a column lacks a scale or categories, or the round cannot take place.
        DataError: a cell is not what its column should hold; names file, row and column.
    """
    if how.scale == "constants":
        return Prepared(encoding=declared(table, how.scales, how.categories), said="scaled by constants")
    if how.scale == "none":
        return Prepared(encoding=as_it_is(table, how.categories))
    expected = "constants where a folder does not hold all clients: a statistics round needs the rows of all"
    require(whole, "scale", how.scale, expected, "scale=constants")
    parts = [column_sums(rows_of(table, rows), noise=how.noise) for rows in train]
    of = f"of {len(train)} client{'s' * (len(train) != 1)}"
    if how.noise is None:
        encoding = found(table, add(parts), how.categories)
        told = "exact counts, means and deviations of columns"
        return Prepared(encoding=encoding, said=f"scaled by exact statistics {of}", told=told)
    released = add(noisy(part, how.noise, client=client) for client, part in enumerate(parts))
    noise = f"noise multiplier {how.noise.multiplier:g}"
    return Prepared(
        encoding=found(table, settled(released, how.noise), how.categories),
        said=f"scaled by noisy statistics {of} ({noise})",
        told=f"counts, means and deviations of columns, noisy for single rows only ({noise})",
        ledger=how.noise.charged(range(len(train))),
    )
