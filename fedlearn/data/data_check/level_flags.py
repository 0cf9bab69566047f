"""Flag levels of a column that differ in spelling, or that occur at a single site.

Shapes: N rows, L levels, S sites.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from fedlearn.advice import assignment
from fedlearn.data.data_check.coded_table import CodedColumn, CodedTable
from fedlearn.data.data_check.records import Flag
from fedlearn.data.data_check.unit_flags import join_names

MAX_LEVELS = 300
MIN_LENGTH = 4  # characters of a level with a typing error
RARE = 0.2  # largest count of a level with a typing error, relative to the correct level
NEARLY_ALL = 0.95  # share of a level at its site
CHANCE = 1e-4  # probability that equal sites differ as much
MAX_CODES = 10  # distinct whole numbers of a coded column


def flag_spelling(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each column with levels that differ in case, spaces, accents or one letter."""
    for column in table.of_kind("category", "target", "client"):
        if column.is_numeric or not 2 <= len(column.values_L) <= MAX_LEVELS:
            continue
        groups = [*_equal_levels(column), *_similar_levels(table, column)]
        if groups:
            names = "; ".join(" and ".join(map(_shown, group)) for group in groups[:4])
            more = f" and {len(groups) - 4} more pairs" if len(groups) > 4 else ""
            yield Flag(
                kind="spelling",
                column=column.name,
                sites=_sites_of(table, column, {level for group in groups for level in group}),
                message=f"{column.name}: {names}{more} differ in spelling only, and count as different levels",
                advice=_advice(table, column),
            )


def flag_levels_by_site(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each column with a level that occurs at one site only, more often than by chance."""
    for column in table.of_kind("category", "number", "property") if table.num_sites > 1 else ():
        is_coded = not column.is_numeric or (column.is_whole and len(column.values_L) <= MAX_CODES)
        if not is_coded or not 2 <= len(column.values_L) <= MAX_LEVELS:
            continue
        counts_SL = column.counts_by_site(table.site_N, table.num_sites)
        num_values_S = counts_SL.sum(axis=1)
        found = [
            level for level in range(len(column.values_L)) if _belongs_to_a_site(counts_SL[:, level], num_values_S)
        ]
        if not found or (num_values_S > 0).sum() < 2:
            continue
        levels_of: dict[int, list[int]] = defaultdict(list)
        for level in found:
            levels_of[int(counts_SL[:, level].argmax())].append(level)
        parts = [_describe(table, column, counts_SL, site, levels) for site, levels in levels_of.items()]
        is_property = column.name in table.settings.properties
        yield Flag(
            kind="levels by site",
            column=column.name,
            sites=tuple(table.sites[site] for site in levels_of),
            message=f"{column.name}: {'; '.join(parts[:4])}" + f" and {len(parts) - 4} more sites" * (len(parts) > 4),
            advice=table.settings.listing if is_property else table.settings.without(column.name),
        )


def _describe(table: CodedTable, column: CodedColumn, counts_SL: np.ndarray, site: int, levels: Sequence[int]) -> str:
    names = join_names([_shown(column.texts[level]) for level in levels])
    nearly = "nearly " * bool(np.delete(counts_SL[:, levels], site, axis=0).any())
    return f"{names} {nearly}only at {table.sites[site]}"


def _belongs_to_a_site(count_S: np.ndarray, num_values_S: np.ndarray) -> bool:
    """Return whether nearly all cells of a level are at one site, against the odds if levels and sites are unrelated.

    The bound on the probability is that of Chernoff (1952): ``exp(-n KL(share, expected share))``.
    """
    site, total = int(count_S.argmax()), int(count_S.sum())
    share, expected = count_S[site] / total, num_values_S[site] / num_values_S.sum()
    if share < NEARLY_ALL or expected >= share:
        return False
    divergence = share * math.log(share / expected)
    divergence += (1 - share) * math.log((1 - share) / (1 - expected)) if share < 1 else 0.0
    return total * divergence > -math.log(CHANCE)


def _equal_levels(column: CodedColumn) -> list[list[str]]:
    groups = defaultdict(list)
    for text in column.texts:
        groups[plain_form(text)].append(text)
    return [sorted(group) for key, group in groups.items() if len(group) > 1 and key]


def plain_form(text: str) -> str:
    """Return a text without case, accents, spaces and punctuation; signs that change a meaning remain.

    >>> plain_form(" São-Paulo "), plain_form("A+"), plain_form("A-")
    ('saopaulo', 'a+', 'a-')
    """
    decomposed = unicodedata.normalize("NFKD", text.strip()).casefold()
    letters = "".join(char for char in decomposed if not unicodedata.combining(char))
    return re.sub(r"(?<=\w)[\s_.'-]+(?=\w)|[\s.,;:'\"]+", "", letters)


def _similar_levels(table: CodedTable, column: CodedColumn) -> list[list[str]]:
    """Return pairs of levels that differ in one letter, if one is rare or the two do not occur at the same sites."""
    counts_SL = column.counts_by_site(table.site_N, table.num_sites)
    found = []
    for left, right in combinations(range(len(column.texts)), 2):
        first, second = plain_form(column.texts[left]), plain_form(column.texts[right])
        if first == second or not are_similar(first, second):
            continue
        low, high = sorted((column.counts[left], column.counts[right]))
        is_apart = table.num_sites > 1 and not ((counts_SL[:, left] > 0) & (counts_SL[:, right] > 0)).any()
        if low <= RARE * high or is_apart:
            found.append(sorted((column.texts[left], column.texts[right])))
    return found


def are_similar(left: str, right: str) -> bool:
    """Return whether two words differ in one inserted, removed, replaced or swapped letter.

    >>> are_similar("never", "nevr"), are_similar("ward1", "ward2")
    (True, False)
    """
    if min(len(left), len(right)) < MIN_LENGTH or abs(len(left) - len(right)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    a, b = left[start:], right[start:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    is_swap = len(a) == 2 and a == b[::-1]
    return (max(len(a), len(b)) <= 1 or is_swap) and (a + b).isalpha()


def _advice(table: CodedTable, column: CodedColumn) -> str:
    """Return the setting that lists the levels of a target or leaves the column out."""
    if table.taken_as[column.name] == "category":
        return table.settings.without(column.name)
    largest = {}
    for level in np.argsort(column.counts):
        largest[plain_form(column.texts[level])] = column.texts[level]
    setting = "classes" if table.taken_as[column.name] == "target" else "clients"
    return assignment(f"scenario.{setting}", sorted(largest.values()))


def _sites_of(table: CodedTable, column: CodedColumn, levels: set[str]) -> tuple[str, ...]:
    counts_SL = column.counts_by_site(table.site_N, table.num_sites)
    chosen = [index for index, text in enumerate(column.texts) if text in levels]
    return table.names(np.flatnonzero(counts_SL[:, chosen].sum(axis=1)))


def _shown(text: str) -> str:
    return f'"{text[:40]}"'
