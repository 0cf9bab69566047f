"""Summarize the columns of a table, overall and by site.

Shapes: N rows, L levels, S sites.
"""

from __future__ import annotations

import numpy as np

from fedlearn.data.data_check.coded_table import CodedColumn, CodedTable
from fedlearn.data.data_check.records import ColumnSummary, SiteSummary
from fedlearn.data.data_check.typed_columns import TypedColumns

MAX_LEVELS_SHOWN = 5
KINDS_OF_TEXT = ("id", "text", "many levels")  # too many values to list
MAX_SITES_SHOWN = 4
MAX_SITES_LISTED = 200
MAX_LEVELS_COUNTED = 50


def summarize(table: CodedTable, typed: TypedColumns) -> tuple[ColumnSummary, ...]:
    """Return the summary of each column, in the order of the file."""
    return tuple(_summarize_column(table, column, typed) for column in table.columns.values())


def _summarize_column(table: CodedTable, column: CodedColumn, typed: TypedColumns) -> ColumnSummary:
    num_missing = table.num_rows - column.num_present
    shows_range = column.is_numeric and len(column.values_L) > 2
    sites = _by_site(table, column, shows_range) if table.num_sites > 1 else ()
    return ColumnSummary(
        name=column.name,
        taken_as=table.taken_as[column.name],
        format=typed.format_text(column.name, is_whole=column.is_whole),
        content=_content(column, table.taken_as[column.name], shows_range, is_date=typed.is_date(column.name)),
        num_missing=num_missing,
        share_missing=num_missing / max(1, table.num_rows),
        by_site=_differences(column, sites, shows_range, is_date=typed.is_date(column.name)),
        sites=sites,
    )


def _content(column: CodedColumn, kind: str, shows_range: bool, *, is_date: bool) -> str:
    if shows_range:
        return _range(column, is_date)
    if kind in KINDS_OF_TEXT and len(column.values_L):
        return f"{len(column.values_L):,} values, e.g. {column.texts[0][:40]}"
    return _levels(column)


def _range(column: CodedColumn, is_date: bool) -> str:
    low, median, high = np.quantile(column.cell_numbers[column.present], (0.01, 0.5, 0.99))
    if is_date:
        return f"{_day(median)}  ({_day(low)} to {_day(high)})"
    return f"{median:.4g}  ({low:.4g} to {high:.4g})"


def _day(days: float) -> str:
    return str(np.datetime64(0, "D") + np.timedelta64(round(days), "D"))


def _levels(column: CodedColumn) -> str:
    order = np.argsort(-column.counts, kind="stable")
    shown = [f"{column.texts[index][:24]} {int(column.counts[index]):,}" for index in order[:MAX_LEVELS_SHOWN]]
    more = len(order) - MAX_LEVELS_SHOWN
    return ", ".join(shown) + f", {more:,} more" * (more > 0)


def _by_site(table: CodedTable, column: CodedColumn, shows_range: bool) -> tuple[SiteSummary, ...]:
    if table.num_sites > MAX_SITES_LISTED:
        return ()
    counts_SL = column.counts_by_site(table.site_N, table.num_sites)
    is_counted = not shows_range and len(column.values_L) <= MAX_LEVELS_COUNTED
    summaries = []
    for site, name in enumerate(table.sites):
        values = column.cell_numbers[(table.site_N == site) & column.present] if shows_range else np.zeros(0)
        quartiles = np.quantile(values, (0.25, 0.5, 0.75)) if len(values) else None
        num_rows = int(table.rows_by_site[site])
        summaries.append(
            SiteSummary(
                site=name,
                num_rows=num_rows,
                num_missing=num_rows - int(counts_SL[site].sum()),
                median=None if quartiles is None else float(quartiles[1]),
                iqr=None if quartiles is None else float(quartiles[2] - quartiles[0]),
                counts={column.texts[i]: int(counts_SL[site, i]) for i in range(len(column.texts))}
                if is_counted
                else {},
            )
        )
    return tuple(summaries)


def _differences(column: CodedColumn, sites: tuple[SiteSummary, ...], shows_range: bool, *, is_date: bool) -> str:
    show = _day if is_date else "{:.4g}".format
    medians = [site.median for site in sites if site.median is not None]
    if shows_range and len(medians) > 1:
        if len(sites) <= MAX_SITES_SHOWN:
            return ", ".join(f"{site.site} {'–' if site.median is None else show(site.median)}" for site in sites)
        return f"medians {show(min(medians))} to {show(max(medians))}"
    shares = [(site.site, site.counts) for site in sites if sum(site.counts.values())]
    if len(shares) < 2 or not 2 <= len(column.texts) <= MAX_LEVELS_COUNTED:
        return ""
    top = column.texts[int(column.counts.argmax())]
    percent = [(name, 100 * counts[top] / sum(counts.values())) for name, counts in shares]
    if len(percent) <= MAX_SITES_SHOWN:
        return f"{top[:24]}: " + ", ".join(f"{name} {value:.0f} %" for name, value in percent)
    values = [value for _, value in percent]
    return f"{top[:24]}: {min(values):.0f} to {max(values):.0f} %"
