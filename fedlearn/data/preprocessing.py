"""How columns are scaled and filled in: by constants, or by what a federated statistics round finds.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlearn.core.privacy_ledger import Ledger
from fedlearn.data.encoding import ColumnEncoding, declared_encoding, encoding_from_statistics, identity_encoding
from fedlearn.data.federated_statistics import Noise, add_noise, add_sums, column_sums, project_to_bounds
from fedlearn.data.tables import Table, take_rows
from fedlearn.errors import did_you_mean, require

SCALES = ("federated", "constants", "none")


@dataclass(frozen=True, kw_only=True)
class PreprocessingSettings:
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
class PreprocessingResult:
    """How columns become numbers, and what it took to find out.

    Args:
        encoding: of the columns.
        summary: for the header.
        disclosure: what clients have told, in words; empty for nothing.
        ledger: what each client has paid for that.
    """

    encoding: ColumnEncoding = field(default_factory=lambda: ColumnEncoding(scales={}, categories={}))
    summary: str = ""
    disclosure: str = ""
    ledger: Ledger = field(default_factory=Ledger)


def fit_preprocessing(
    table: Table, train: Sequence[np.ndarray], settings: PreprocessingSettings, *, has_all_clients: bool
) -> PreprocessingResult:
    """Decide how columns become numbers.

    Args:
        table: of all rows that are here.
        train: the training rows of each client; no others are looked at for statistics.
        settings: what was asked for.
        has_all_clients: whether all clients' rows are here, which a statistics round needs.

    Raises:
        SettingError: a column lacks a scale or categories, or the round cannot take place.
        DataError: a cell is not what its column should hold; names file, row and column.
    """
    if settings.scale == "constants":
        return PreprocessingResult(
            encoding=declared_encoding(table, settings.scales, settings.categories), summary="scaled by constants"
        )
    if settings.scale == "none":
        return PreprocessingResult(encoding=identity_encoding(table, settings.categories))
    expected = "constants where a folder does not hold all clients: a statistics round needs the rows of all"
    require(has_all_clients, "scale", settings.scale, expected, "scale=constants")
    parts = [column_sums(take_rows(table, rows), noise=settings.noise) for rows in train]
    of = f"of {len(train)} client{'s' * (len(train) != 1)}"
    if settings.noise is None:
        encoding = encoding_from_statistics(table, add_sums(parts), settings.categories)
        told = "exact counts, means and deviations of columns"
        return PreprocessingResult(encoding=encoding, summary=f"scaled by exact statistics {of}", disclosure=told)
    released = add_sums(add_noise(part, settings.noise, client=client) for client, part in enumerate(parts))
    noise = f"noise multiplier {settings.noise.multiplier:g}"
    return PreprocessingResult(
        encoding=encoding_from_statistics(table, project_to_bounds(released, settings.noise), settings.categories),
        summary=f"scaled by noisy statistics {of} ({noise})",
        disclosure=f"counts, means and deviations of columns, noisy for single rows only ({noise})",
        ledger=settings.noise.initial_ledger(range(len(train))),
    )
