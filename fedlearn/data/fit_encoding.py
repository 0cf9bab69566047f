"""Fit the encoding of columns: scales and categories, from declared constants or from federated statistics.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlearn.core.privacy_ledger import Ledger
from fedlearn.data.column_types import Column, Number
from fedlearn.data.encoding import declared_encoding, encoding_from_statistics, identity_encoding
from fedlearn.data.federated_statistics import Noise, add_noise, add_sums, column_sums, project_to_bounds
from fedlearn.data.tables import Table, take_rows
from fedlearn.errors import did_you_mean, require

SCALES = ("federated", "constants", "none")


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """Hold the settings of the encoding of columns.

    Args:
        scale: ``federated``, ``constants`` or ``none``.
        scales: (centre, spread) of each numeric column, for ``constants``.
        categories: values of each column of categories.
        noise: noise on the statistics of ``federated``; None computes exact statistics.
    """

    scale: str
    scales: Mapping[str, Sequence[float]] = field(default_factory=dict)
    categories: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    noise: Noise | None = None

    def __post_init__(self) -> None:
        closest = did_you_mean(str(self.scale), SCALES) or "federated"
        require(self.scale in SCALES, "scale", self.scale, f"one of {', '.join(SCALES)}", f"scale={closest}")
        fits = self.noise is None or self.scale == "federated"
        expected = "null, because only scale=federated computes statistics"
        require(fits, "noise_multiplier", self.noise and self.noise.multiplier, expected, "scale=federated")


@dataclass(frozen=True, kw_only=True)
class EncodingResult:
    """Hold the encoding of the columns, and the disclosure and privacy cost of its statistics.

    Args:
        columns: kinds and constants of the columns.
        allow_unknown: whether an unknown category of a training row counts as missing. If not, it is an error.
        summary: description for the header of a run.
        disclosure: description of the statistics that clients sent; empty for none.
        ledger: privacy cost of each client.
    """

    columns: tuple[Column, ...] = ()
    allow_unknown: bool = False
    summary: str = ""
    disclosure: str = ""
    ledger: Ledger = field(default_factory=Ledger)

    def scale(self, name: str) -> tuple[float, float]:
        """Return (centre, spread) of a numeric column, or (0, 1) if the result has no such column."""
        numbers = (column for column in self.columns if isinstance(column, Number) and column.name == name)
        return next(((column.centre, column.spread) for column in numbers), (0.0, 1.0))


def fit_encoding(
    table: Table, train: Sequence[np.ndarray], settings: EncodingSettings, *, has_all_clients: bool
) -> EncodingResult:
    """Compute the encoding of the columns by the settings.

    Args:
        table: all available rows.
        train: training rows of each client; statistics use no other rows.
        settings: settings of the encoding.
        has_all_clients: whether the table has the rows of all clients, which federated statistics need.

    Raises:
        SettingError: a column has neither a scale nor categories, or federated statistics are not possible.
        DataError: a cell is not valid for its column; the message names file, row and column.
    """
    if settings.scale == "constants":
        return EncodingResult(
            columns=declared_encoding(table, settings.scales, settings.categories), summary="scaled by constants"
        )
    if settings.scale == "none":
        return EncodingResult(columns=identity_encoding(table, settings.categories))
    expected = "constants, because this folder does not have all clients, which federated statistics need"
    require(has_all_clients, "scale", settings.scale, expected, "scale=constants")
    parts = [column_sums(take_rows(table, rows), noise=settings.noise) for rows in train]
    source = f"of {len(train)} client{'s' * (len(train) != 1)}"
    if settings.noise is None:
        columns = encoding_from_statistics(table, add_sums(parts), settings.categories)
        disclosure = "exact counts, means and deviations of columns"
        return EncodingResult(
            columns=columns,
            allow_unknown=True,
            summary=f"scaled by exact statistics {source}",
            disclosure=disclosure,
        )
    released = add_sums(add_noise(part, settings.noise, client=client) for client, part in enumerate(parts))
    noise = f"noise multiplier {settings.noise.multiplier:g}"
    return EncodingResult(
        columns=encoding_from_statistics(table, project_to_bounds(released, settings.noise), settings.categories),
        allow_unknown=True,
        summary=f"scaled by noisy statistics {source} ({noise})",
        disclosure=f"counts, means and deviations of columns, noisy for single rows only ({noise})",
        ledger=settings.noise.initial_ledger(range(len(train))),
    )
