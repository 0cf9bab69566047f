"""Flag rows that occur several times, rows with equal inputs and different targets, and unequal sites.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fedlearn.data.data_check.coded_table import CodedColumn, CodedTable
from fedlearn.data.data_check.records import Flag
from fedlearn.data.data_check.value_flags import locations

MIN_DUPLICATES = 2
SHARE_OF_DUPLICATES = 0.002  # fewer are left to chance
CHANCE = 0.1  # expected number of equal pairs of independent columns, relative to the number of pairs
MAX_RATIO = 20  # between the rows of the largest and the smallest site
FEW_ROWS = 10  # at a site
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the product has an inverse


def flag_rows(table: CodedTable) -> Iterator[Flag]:
    """Yield flags for duplicated rows across sites, across splits and inside a site, and for contradictions."""
    inputs = table.of_kind("number", "category", "text", "date", "constant", "many levels")
    inputs = inputs if table.digest is None else [table.digest]
    target = [] if table.target is None else [table.target]
    if not inputs or table.num_rows < 2:
        return
    yield from _flag_duplicates(table, [*inputs, *target] if table.digest is None else inputs)
    if target:
        yield from _flag_contradictions(table, inputs, target[0])


def _flag_duplicates(table: CodedTable, columns: Sequence[CodedColumn]) -> Iterator[Flag]:
    keys_N = row_keys(columns, table.num_rows)
    inverse_N, counts_G = _groups(keys_N)
    if table.digest is None and not _is_more_than_chance(counts_G, columns, table.num_rows):
        return
    repeated_N = counts_G[inverse_N] > 1
    across_N = repeated_N & _spans(inverse_N, table.site_N, len(counts_G))
    inside_N = repeated_N & ~across_N
    if across_N.sum() > MIN_DUPLICATES:
        sites = table.names(np.unique(table.site_N[across_N]))
        yield _flag(
            table, "duplicates across sites", across_N, f"{_count(table, across_N)} occur at more than one site", sites
        )
    if table.split_N is not None:
        leaking_N = repeated_N & _spans(inverse_N, table.split_N, len(counts_G))
        inside_N &= ~leaking_N
        if leaking_N.sum() > MIN_DUPLICATES:
            yield _flag(
                table,
                "duplicates across splits",
                leaking_N,
                f"{_count(table, leaking_N)} are in training and test files",
            )
    if inside_N.sum() > max(MIN_DUPLICATES, SHARE_OF_DUPLICATES * table.num_rows):
        yield _flag(table, "duplicates", inside_N, f"{_count(table, inside_N)} occur several times at the same site")


def _flag_contradictions(table: CodedTable, inputs: Sequence[CodedColumn], target: CodedColumn) -> Iterator[Flag]:
    inverse_N, counts_G = _groups(row_keys(inputs, table.num_rows))
    if table.digest is None and not _is_more_than_chance(counts_G, inputs, table.num_rows):
        return
    contradicted_N = (counts_G[inverse_N] > 1) & _spans(inverse_N, target.codes_N, len(counts_G))
    if contradicted_N.sum() > max(MIN_DUPLICATES, SHARE_OF_DUPLICATES * table.num_rows):
        text = f"{_count(table, contradicted_N)} have equal inputs, but different values of {target.name}"
        yield _flag(table, "contradictions", contradicted_N, text)


def _flag(table: CodedTable, kind: str, found_N: np.ndarray, message: str, sites: Sequence[str] = ()) -> Flag:
    rows = locations(table, np.flatnonzero(found_N))
    return Flag(kind=kind, message=message, advice=table.settings.listing, sites=tuple(sites), rows=rows)


def flag_sizes(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag if some sites have few rows, or far fewer rows than the largest site."""
    if table.num_sites < 2:
        return
    rows_S = table.rows_by_site
    smallest, largest = int(rows_S.argmin()), int(rows_S.argmax())
    if rows_S[largest] >= MAX_RATIO * max(1, rows_S[smallest]) or (rows_S < FEW_ROWS).any():
        few = int((rows_S < FEW_ROWS).sum())
        text = f"{table.sites[smallest]} has {rows_S[smallest]:,} rows, {table.sites[largest]} has {rows_S[largest]:,}"
        text += f"; {few} of {table.num_sites} sites have fewer than {FEW_ROWS} rows" if few else ""
        sites = (table.sites[smallest],) if not few else table.names(rows_S < FEW_ROWS)
        yield Flag(kind="rows by site", message=text, sites=sites, advice="strategy=fednova")


def row_keys(columns: Iterable[CodedColumn], num_rows: int) -> np.ndarray:
    """Return one 64-bit key per row; equal rows have equal keys."""
    keys_N = np.zeros(num_rows, np.uint64)
    for column in columns:
        mixed_N = (keys_N ^ (column.codes_N + 2).astype(np.uint64)) * MULTIPLIER
        keys_N = (mixed_N ^ (mixed_N >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        keys_N ^= keys_N >> np.uint64(32)
    return keys_N


def _groups(keys_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each row, and the number of rows of each group."""
    _, inverse_N, counts_G = np.unique(keys_N, return_inverse=True, return_counts=True)
    return inverse_N, counts_G


def _spans(inverse_N: np.ndarray, label_N: np.ndarray, num_groups: int) -> np.ndarray:
    """Return a mask of the rows whose group has more than one label."""
    low_G, high_G = np.full(num_groups, np.iinfo(np.int64).max), np.full(num_groups, np.iinfo(np.int64).min)
    np.minimum.at(low_G, inverse_N, label_N)
    np.maximum.at(high_G, inverse_N, label_N)
    return np.asarray((low_G < high_G)[inverse_N])


def _is_more_than_chance(counts_G: np.ndarray, columns: Sequence[CodedColumn], num_rows: int) -> bool:
    """Return whether more pairs of rows are equal than independent columns with these frequencies would give."""
    shares = [float(((column.counts / max(1, column.num_present)) ** 2).sum()) for column in columns]
    expected = num_rows * (num_rows - 1) / 2 * float(np.prod(shares))
    pairs = float((counts_G * (counts_G - 1.0) / 2).sum())
    return pairs > 0 and expected < CHANCE * pairs


def _count(table: CodedTable, found_N: np.ndarray) -> str:
    return f"{int(found_N.sum()):,} {'rows' if table.digest is None else 'images'}"
