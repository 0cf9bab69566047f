"""Flag cells that stand for missing values, cells that are no numbers, and numbers far from all others.

Shapes: N rows, L distinct values, S sites.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from fedlearn.data.data_check.coded_table import CodedColumn, CodedTable
from fedlearn.data.data_check.records import Flag
from fedlearn.data.data_check.unit_flags import join_names

MARKERS = frozenset(
    "- -- --- . .. ... … — – * ** x xx xxx n.a n.a. n/a na nan n.d. nd n/d nk n.k. nil none null unk unknown missing "  # noqa: SIM905
    "(missing) (null) [null] <na> <null> #n/a #na #null! #value! #div/0! #ref! #num! not_available notavailable "
    "inconnu unbekannt k.a. k.a s.d. nr n.r. void empty blank tbd ? ?? ??? nat 未知 缺失 无 不明".split()
) | {"not available", "not applicable", "not known", "not done", "not recorded", "no data", "keine angabe", "k. a."}
FIXED_PLACEHOLDERS = (-1.0, -2.0, -3.0, -5.0, -7.0, -8.0, -9.0)  # negative codes of surveys
PLACEHOLDER = re.compile(
    r"-?(9{2,}|8{3,}|7{3,}|1234567\d*|4294967295|2147483647|2147483648|32767|32768|65535)(\.9+|\.0+)?"
)
HUGE = 1e30  # no measurement is as large
MIN_LEVELS = 6  # distinct other values; fewer are codes
GAP = 0.5  # between a placeholder and the other values, relative to their range
SMALL_COUNTS = (1.0, 2.0)  # smallest other value of a column of counts
GAP_OF_ZERO = 0.3  # smallest other value, relative to the median
SHARE_WRITTEN = 0.8  # levels that look like numbers
OUTLIER = 20.0  # distance from the mean, in standard deviations
NUMBER_INSIDE = re.compile(
    r"\s*[<>~≈]?\s*[-+−]?[\d.,' \u00a0\u202f]*\d\s*(%|[^\W\d]{1,6}(/[^\W\d]{1,6})?|°[CF])?\s*", re.ASCII
)


def flag_markers(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each column with text that stands for a missing value, but counts as a level."""
    for column in table.of_kind("category", "target", "text", "many levels"):
        if column.name in table.settings.categories:
            continue
        found = [index for index, text in enumerate(column.texts) if not column.is_numeric and is_marker(text)]
        if found:
            count = int(column.counts[found].sum())
            names = join_names([f'"{column.texts[index]}"' for index in found])
            yield Flag(
                kind="missing markers",
                column=column.name,
                sites=_sites(table, column, found),
                rows=_rows(table, np.isin(column.codes_N, found)),
                message=f"{column.name}: {names} in {cells(count)} counts as a level, and may mean missing; "
                "a schema lists it below missing",
                advice=table.settings.schema_command,
            )


def is_marker(text: str) -> bool:
    """Return whether a text usually stands for a missing value.

    >>> [is_marker(text) for text in ("n.a.", "-", "no")]
    [True, True, False]
    """
    return text.strip().casefold() in MARKERS or not text.strip()


def flag_wrong_cells(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each column of numbers or dates with cells in another format, which end a run."""
    for name, wrong_N in table.wrong.items():
        found = Counter(cell for cell in wrong_N.tolist() if cell is not None)
        if not found:
            continue
        are_markers = all(map(is_marker, found))
        examples = join_names([f'"{cell[:20]}"' for cell, _ in found.most_common()], at_most=3)
        count = sum(found.values())
        differs_N = np.array([cell is not None for cell in wrong_N], bool)
        problem = "may mean missing; a schema lists it below missing" if are_markers else "differs from the others"
        yield Flag(
            kind="missing markers" if are_markers else "not numbers",
            column=name,
            sites=table.names(np.unique(table.site_N[differs_N])) if table.num_sites > 1 else (),
            rows=_rows(table, differs_N),
            message=f"{name}: {examples} in {cells(count)} of a column of numbers or dates {problem}",
            advice=table.settings.schema_command if are_markers else table.settings.without(name),
        )


def flag_number_texts(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each column of categories whose levels look like numbers with units or other signs."""
    for column in table.of_kind("category", "many levels"):
        if column.is_numeric or len(column.values_L) <= 3:
            continue
        texts = [text for text in column.texts if not is_marker(text)]
        is_written_N = [bool(NUMBER_INSIDE.fullmatch(text)) for text in texts]
        if texts and sum(is_written_N) >= SHARE_WRITTEN * len(texts) and not all(map(is_code, texts)):
            examples = join_names([f'"{text[:20]}"' for text in texts], at_most=3)
            yield Flag(
                kind="not numbers",
                column=column.name,
                message=f"{column.name}: {examples} look like numbers, but count as levels",
                advice=table.settings.schema_command,
            )


def is_code(text: str) -> bool:
    """Return whether a text is a code of digits, which is no number.

    >>> [is_code(text) for text in ("007", "12 kg", "1,5")]
    [True, False, False]
    """
    return text.isalnum()


def flag_placeholders(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each numeric column with numbers such as -999 or 1e300 far from all others."""
    for column in table.of_kind("number", "target"):
        found = placeholders(column) if column.is_numeric else []
        if found:
            count = int(column.counts[found].sum())
            names = join_names([f"{column.numbers[index]:.10g}" for index in found])
            yield Flag(
                kind="placeholder numbers",
                column=column.name,
                sites=_sites(table, column, found),
                rows=_rows(table, np.isin(column.codes_N, found)),
                message=f"{column.name}: {names} in {cells(count)} is far from all other values, and may mean missing; "
                "a schema lists it below missing",
                advice=table.settings.schema_command,
            )


def placeholders(column: CodedColumn) -> list[int]:
    """Return the indices of the distinct values that probably stand for a missing value."""
    numbers_L, counts_L = column.numbers, column.counts
    huge_L = np.abs(numbers_L) >= HUGE
    named_L = np.array([bool(PLACEHOLDER.fullmatch(f"{value:.10g}")) for value in numbers_L[_ends(len(numbers_L))]])
    candidates = [*np.flatnonzero(huge_L), *(_ends(len(numbers_L))[named_L])]
    candidates += [i for i in _ends(len(numbers_L)) if numbers_L[i] in FIXED_PLACEHOLDERS and counts_L[i] > 1]
    rest = np.delete(np.arange(len(numbers_L)), sorted({int(index) for index in candidates}))
    if len(rest) < MIN_LEVELS:
        return [int(index) for index in np.flatnonzero(huge_L)]
    low, high = numbers_L[rest[0]], numbers_L[rest[-1]]
    found = {int(index) for index in candidates if huge_L[index] or _is_apart(numbers_L[index], low, high)}
    zero = np.flatnonzero(numbers_L == 0)
    if len(zero) and numbers_L[0] == 0 and counts_L[0] > 1 and _zero_is_apart(column):
        found.add(0)
    return sorted(found)


def _ends(size: int) -> np.ndarray:
    """Return the places of the smallest and the largest values."""
    return np.unique(np.concatenate([np.arange(min(4, size)), np.arange(max(0, size - 4), size)]))


def _is_apart(value: float, low: float, high: float) -> bool:
    if value in FIXED_PLACEHOLDERS:
        return low >= 0 and value < 0
    return value < low - GAP * (high - low) or value > high + GAP * (high - low)


def _zero_is_apart(column: CodedColumn) -> bool:
    """Return whether the other values are positive and far from 0, and more frequent than 0."""
    others = column.cell_numbers[column.present & (column.cell_numbers != 0)]
    is_rare = 2 * len(others) > column.num_present
    return (
        is_rare
        and len(column.numbers) > 2 * MIN_LEVELS
        and float(column.numbers[1]) > GAP_OF_ZERO * float(np.median(others))
    )


def flag_outliers(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each numeric column with a value more than 20 standard deviations from the mean."""
    for column in table.of_kind("number"):
        if not column.is_numeric or len(column.values_L) < MIN_LEVELS or placeholders(column):
            continue
        distance_L = np.zeros(len(column.numbers))
        for index in _ends(len(column.numbers)):
            distance_L[index] = _distance(column, int(index))
        found = np.flatnonzero(distance_L > OUTLIER)
        if len(found):
            worst = int(distance_L.argmax())
            yield Flag(
                kind="outliers",
                column=column.name,
                sites=_sites(table, column, found),
                rows=_rows(table, np.isin(column.codes_N, found)),
                message=f"{column.name}: {column.numbers[worst]:.6g} is {distance_L[worst]:.0f} standard deviations "
                "from the mean of all others",
                advice=table.settings.without(column.name),
            )


def _distance(column: CodedColumn, index: int) -> float:
    """Return the distance of a value from the mean of all other cells, in their standard deviations."""
    others = column.cell_numbers[column.present & (column.codes_N != index)]
    spread = float(others.std())
    return abs(float(column.numbers[index]) - float(others.mean())) / spread if spread > 0 else 0.0


def cells(count: int) -> str:
    """Return a number of cells as text.

    >>> cells(1), cells(1200)
    ('1 cell', '1,200 cells')
    """
    return f"{count:,} cell{'s' * (count != 1)}"


def _sites(table: CodedTable, column: CodedColumn, levels: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    if table.num_sites < 2:
        return ()
    return table.names(
        np.flatnonzero(column.counts_by_site(table.site_N, table.num_sites)[:, list(levels)].sum(axis=1))
    )


def _rows(table: CodedTable, found_N: np.ndarray) -> tuple[str, ...]:
    return locations(table, np.flatnonzero(found_N))


def locations(table: CodedTable, rows: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """Return file and row number of the first rows, at most `MAX_ROWS_LISTED`."""
    return tuple(table.location(int(row)) for row in rows[:MAX_ROWS_LISTED])


MAX_ROWS_LISTED = 1000
