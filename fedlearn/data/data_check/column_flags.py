"""Flag columns by their kind: constants, identifiers, dates, free text, and columns without values.

Shapes: N rows, L distinct values, S sites.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedlearn.advice import assignment
from fedlearn.data.data_check.coded_table import CodedTable
from fedlearn.data.data_check.records import Flag
from fedlearn.data.data_check.unit_flags import join_names

MIN_ROWS = 10  # rows of a site with a constant column
DIFFERENCE_OF_MISSING = 0.3  # between the shares of missing cells at two sites
MOSTLY_MISSING = 0.5  # share of missing cells
MESSAGES = {
    "id": ("identifier", "identifies rows or persons, and means nothing for new ones"),
    "date": ("date", "dates, which a run reads as numbers or levels; new rows have later dates"),
    "text": ("free text", "sentences, not levels"),
    "many levels": ("many levels", "too many levels for a column of categories"),
}


def flag_kinds(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each identifier, date and column of free text."""
    for kind, (name, reason) in MESSAGES.items():
        for column in table.of_kind(kind):
            count = f"{len(column.values_L):,} values in {column.num_present:,} rows"
            only_text = kind == "text" and len(table.of_kind("number", "category")) == 0
            advice = assignment("scenario.text", column.name) if only_text else table.settings.without(column.name)
            yield Flag(kind=name, column=column.name, message=f"{column.name}: {reason}; {count}", advice=advice)


def flag_constants(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each column with the same value in all rows, or in all rows of a site."""
    for column in table.columns.values():
        if table.taken_as[column.name] == "constant":
            text = f"{column.name}: {column.texts[0][:40]} in all rows"
            text += f", or missing ({table.num_rows - column.num_present:,})" if not column.present.all() else ""
            yield Flag(kind="constant", column=column.name, message=text, advice=table.settings.without(column.name))
    for column in table.of_kind("number", "category") if table.num_sites > 1 else ():
        counts_SL = column.counts_by_site(table.site_N, table.num_sites)
        constant_S = ((counts_SL > 0).sum(axis=1) == 1) & (counts_SL.sum(axis=1) >= MIN_ROWS)
        if constant_S.any() and _is_surprising(counts_SL, constant_S):
            sites = table.names(constant_S)
            level = column.texts[int(counts_SL[constant_S][0].argmax())][:40]
            value = f"{level} in all rows" if constant_S.sum() == 1 else "a single value"
            is_everywhere = len(sites) == table.num_sites
            place = "each site" if is_everywhere else f"{join_names(sites)}, but not at other sites"
            text = f"{column.name}: {value} at {place}"
            yield Flag(
                kind="constant at a site",
                column=column.name,
                sites=sites,
                message=text,
                advice=table.settings.without(column.name),
            )


def _is_surprising(counts_SL: np.ndarray, constant_S: np.ndarray) -> bool:
    """Return whether a site with the frequencies of all sites would rarely have a single value."""
    share_L = counts_SL.sum(axis=0) / counts_SL.sum()
    site = int(np.flatnonzero(constant_S)[0])
    return bool(share_L[counts_SL[site].argmax()] ** counts_SL[site].sum() < 1e-3)


def flag_missing(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each column without values, and for shares of missing cells that differ between sites."""
    for column in table.columns.values():
        kind = table.taken_as[column.name]
        if kind == "empty":
            text = f"{column.name}: all cells are missing"
            yield Flag(
                kind="empty column", column=column.name, message=text, advice=table.settings.without(column.name)
            )
        if kind not in ("number", "category", "target", "text", "client"):
            continue
        missing_S = np.bincount(table.site_N[~column.present], minlength=table.num_sites)
        share_S = missing_S / np.maximum(table.rows_by_site, 1)
        text = _missing_text(table, share_S, 1 - column.num_present / max(1, table.num_rows))
        if kind in ("target", "client") and missing_S.any():
            text = f"missing in {int(missing_S.sum()):,} rows, but it is the {kind}"
        if text:
            sites = table.names(share_S > MOSTLY_MISSING) if table.num_sites > 1 else ()
            is_feature = kind not in ("target", "client")
            yield Flag(
                kind="missing by site",
                column=column.name,
                sites=sites,
                message=f"{column.name}: {text}",
                advice=table.settings.without(column.name) if is_feature else table.settings.listing,
            )


def _missing_text(table: CodedTable, share_S: np.ndarray, share: float) -> str:
    enough_S = table.rows_by_site >= MIN_ROWS
    if table.num_sites > 1 and enough_S.sum() > 1:
        low, high = float(share_S[enough_S].min()), float(share_S[enough_S].max())
        if high - low > DIFFERENCE_OF_MISSING:
            sites = table.names(enough_S & (share_S > low + DIFFERENCE_OF_MISSING))
            return f"{high:.0%} missing at {join_names(sites)}, {low:.0%} at another site".replace("%", " %")
    return f"{share:.0%} of the cells are missing".replace("%", " %") if share > MOSTLY_MISSING else ""
