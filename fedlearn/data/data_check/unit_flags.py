"""Flag numeric columns with different units at the sites.

The check compares robust statistics of the sites: medians and interquartile ranges. A change of unit is a factor, as
from mg/dL to mmol/L, or a factor and a shift, as from °C to °F.

Shapes: N rows, S sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedlearn.data.data_check.coded_table import CodedColumn, CodedTable
from fedlearn.data.data_check.records import Flag

MIN_VALUES = 8  # at a site
MIN_DISTINCT = 8  # values of the column; fewer are codes
SEPARATED = 0.98  # probability that a value of the lower site is smaller
SEPARATED_BY_KNOWN_FACTOR = 0.93
MIN_FACTOR = 3.0  # smallest ratio of medians for an unknown change of unit
MAX_RATIO_OF_FACTORS = 3.0  # between the factors of medians and of interquartile ranges
NUM_COMPARED = 400  # values of a site
TEMPERATURES = ((1.8, 32.0, "°C and °F"), (1.0, 273.15, "°C and K"), (10.93, -23.5, "% and mmol/mol of HbA1c"))
FACTORS = (
    (18.016, "mmol/L and mg/dL of glucose"),
    (88.42, "mg/dL and µmol/L of creatinine"),
    (38.67, "mmol/L and mg/dL of cholesterol"),
    (88.57, "mmol/L and mg/dL of triglycerides"),
    (2.801, "mmol/L and mg/dL of urea nitrogen"),
    (17.1, "mg/dL and µmol/L of bilirubin"),
    (7.5006, "kPa and mmHg"),
    (2.2046, "kg and lb"),
    (2.54, "inch and cm"),
    (30.48, "feet and cm"),
    (3.2808, "m and feet"),
    (1.6093, "miles and km"),
    (28.3495, "oz and g"),
    (4.184, "kcal and kJ"),
    (365.25, "years and days"),
    (12.0, "years and months"),
    (7.0, "weeks and days"),
    (24.0, "days and hours"),
    (60.0, "a factor of 60, e.g. minutes and hours"),
    (10.0, "a factor of 10"),
    (100.0, "a factor of 100, e.g. m and cm, or a share and %"),
    (1000.0, "a factor of 1000, e.g. g and kg"),
    (1e6, "a factor of a million"),
)
TOLERANCES = ((3.0, 0.12), (2.0, 0.08), (1.0, 0.05))  # from this factor, relative difference from a known factor


@dataclass(frozen=True)
class _Spread:
    """Robust statistics of the values of one or more sites."""

    values: np.ndarray
    median: float
    iqr: float


def flag_units(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each numeric column whose sites differ like units do."""
    for column in table.of_kind("number", "target"):
        if column.is_numeric and len(column.values_L) >= MIN_DISTINCT:
            yield from _flag_column(table, column)


def _flag_column(table: CodedTable, column: CodedColumn) -> Iterator[Flag]:
    spreads = {}
    for site in range(table.num_sites):
        values = column.cell_numbers[(table.site_N == site) & column.present]
        if len(values) >= MIN_VALUES:
            spreads[site] = _spread(values)
    groups = _groups(spreads)
    if len(groups) < 2:
        return
    main = max(groups, key=lambda group: sum(len(spreads[site].values) for site in group))
    reference = _spread(np.concatenate([spreads[site].values for site in main]))
    for group in groups:
        other = _spread(np.concatenate([spreads[site].values for site in group]))
        difference = describe_difference(reference, other)
        if group is not main and difference:
            sites = table.names(np.array(sorted(group)))
            yield Flag(
                kind="units",
                column=column.name,
                sites=sites,
                message=f"{column.name}: median {other.median:.4g} at {join_names(sites)}, "
                f"{reference.median:.4g} at the other sites: {difference}",
                advice=table.settings.without(column.name),
            )


def _groups(spreads: dict[int, _Spread]) -> list[list[int]]:
    """Return the sites in groups whose medians follow each other without a change of unit."""
    groups: list[list[int]] = []
    for site in sorted(spreads, key=lambda site: spreads[site].median):
        if groups and not describe_difference(spreads[groups[-1][-1]], spreads[site]):
            groups[-1].append(site)
        else:
            groups.append([site])
    return groups


def _spread(values: np.ndarray) -> _Spread:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    step = max(1, len(values) // NUM_COMPARED)
    return _Spread(np.sort(values)[::step], float(median), float(high - low))


def describe_difference(left: _Spread, right: _Spread) -> str:
    """Return a description of the change of unit between two sites; empty without such a change."""
    low, high = (left, right) if left.median <= right.median else (right, left)
    if min(low.iqr, high.iqr) <= 0:
        return ""
    order = _order(low.values, high.values)
    if order < SEPARATED_BY_KNOWN_FACTOR:
        return ""
    factor_of_iqr = high.iqr / low.iqr
    for slope, shift, names in TEMPERATURES:
        gap = abs(high.median - (slope * low.median + shift))
        if gap < 0.75 * high.iqr and slope / 2 < factor_of_iqr < slope * 2 and order >= SEPARATED:
            return f"{names}?"
    if low.median <= 0:
        return ""
    factor = high.median / low.median
    for known, names in FACTORS:
        is_near = abs(factor / known - 1) < _tolerance(known) and known / 1.7 < factor_of_iqr < known * 1.7
        if is_near:
            return f"{factor:.3g} times, {names}?"
    agrees = 1 / MAX_RATIO_OF_FACTORS < factor_of_iqr / factor < MAX_RATIO_OF_FACTORS
    return f"{factor:.3g} times, different units?" if factor >= MIN_FACTOR and agrees and order >= SEPARATED else ""


def _tolerance(factor: float) -> float:
    return next(tolerance for least, tolerance in TOLERANCES if factor >= least)


def _order(low: np.ndarray, high: np.ndarray) -> float:
    """Return the probability that a value of ``low`` is smaller than a value of ``high``; a tie counts half."""
    below = np.searchsorted(low, high, side="left") + np.searchsorted(low, high, side="right")
    return float(below.mean()) / (2 * len(low))


def join_names(names: Sequence[str], at_most: int = 4) -> str:
    """Return names as text.

    >>> join_names(["a", "b", "c"], at_most=2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:at_most])
    return f"{shown} and {len(names) - at_most} more" if len(names) > at_most else shown
