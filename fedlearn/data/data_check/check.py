"""Check a table: code its columns, decide their kinds, and run all checks.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedlearn.data.data_check.coded_table import CodedColumn, CodedTable, code_column, sample_rows
from fedlearn.data.data_check.column_flags import flag_constants, flag_kinds, flag_missing
from fedlearn.data.data_check.column_kinds import is_date, is_free_text, is_identifier
from fedlearn.data.data_check.level_flags import flag_levels_by_site, flag_spelling
from fedlearn.data.data_check.records import DataCheck, Flag
from fedlearn.data.data_check.row_flags import flag_rows, flag_sizes
from fedlearn.data.data_check.settings import CheckSettings
from fedlearn.data.data_check.summaries import summarize
from fedlearn.data.data_check.target_flags import flag_classes, flag_leakage
from fedlearn.data.data_check.typed_columns import TypedColumns
from fedlearn.data.data_check.unit_flags import flag_units
from fedlearn.data.data_check.value_flags import (
    flag_markers,
    flag_number_texts,
    flag_outliers,
    flag_placeholders,
    flag_wrong_cells,
)

MAX_CELLS = 200_000  # cells of a sample
MIN_SAMPLE = 1_000  # rows of a sample
MAX_CATEGORIES = 50  # levels of a column of categories
CHECKS = (
    flag_units,
    flag_spelling,
    flag_levels_by_site,
    flag_markers,
    flag_wrong_cells,
    flag_number_texts,
    flag_placeholders,
    flag_outliers,
    flag_kinds,
    flag_constants,
    flag_missing,
    flag_rows,
    flag_sizes,
    flag_leakage,
    flag_classes,
)


def check_data(
    typed: TypedColumns,
    settings: CheckSettings,
    *,
    source: str,
    clients_N: np.ndarray | None = None,
    test_N: np.ndarray | None = None,
    flags: Iterable[Flag] = (),
    digests_N: np.ndarray | None = None,
) -> DataCheck:
    """Return a summary of each column, and flags for probable faults.

    Args:
        typed: columns of all rows, with their types.
        settings: roles of the columns.
        source: name of the file or folder.
        clients_N: name of the client of each row; None without clients.
        test_N: mask of the rows in test files; None without a split.
        flags: flags from the reading of the files.
        digests_N: digest of each image, by which rows are compared; None compares the columns.
    """
    sites, site_N = _sites(clients_N, len(typed.table))
    coded = _code(typed, settings, sites, site_N, test_N=test_N, digests_N=digests_N)
    counts = np.bincount(site_N, minlength=len(sites)).tolist()
    found = list(flags)
    with np.errstate(all="ignore"):  # squares of placeholders such as 1e300 overflow
        for check in CHECKS:
            found += check(coded)
        columns = summarize(coded, typed)
    explained = {
        flag.column for flag in found if flag.kind in ("not numbers", "missing markers", "placeholder numbers")
    }
    found += [refusal(name, text, settings) for name, text in typed.refused.items() if name not in explained]
    return DataCheck(
        source=source,
        num_rows=len(typed.table),
        num_checked=coded.num_rows,
        rows_by_site=dict(zip(sites, counts, strict=True)),
        columns=columns,
        ignored=tuple(settings.ignore),
        notes=typed.notes,
        flags=tuple(sorted(found, key=lambda flag: flag.rank)),
    )


def refusal(name: str, text: str, settings: CheckSettings) -> Flag:
    """Return the flag for a column that a run refuses.

    Args:
        name: name of the column; empty for a file.
        text: message of the error.
        settings: settings of the check.
    """
    first, *rest = text.split("\n")
    advice = next((line.split(maxsplit=1)[1] for line in rest if line.split()[:1] == ["try"]), settings.listing)
    kind = "not numbers" if name else "unreadable"
    return Flag(kind=kind, column=name, message=first, advice=advice)


def _code(
    typed: TypedColumns,
    settings: CheckSettings,
    sites: tuple[str, ...],
    site_N: np.ndarray,
    *,
    test_N: np.ndarray | None,
    digests_N: np.ndarray | None,
) -> CodedTable:
    table = typed.table
    is_small = not settings.is_sampled
    max_rows = len(table) if is_small else max(MIN_SAMPLE, MAX_CELLS // max(1, len(table.columns)))
    rows_N = sample_rows(site_N, len(sites), max_rows)
    is_whole = len(rows_N) == len(table)
    columns = {
        name: code_column(name, cells_N if is_whole else cells_N[rows_N]) for name, cells_N in table.columns.items()
    }
    return CodedTable(
        columns=columns,
        settings=settings,
        taken_as={name: taken_as(column, settings, typed) for name, column in columns.items()},
        sites=sites,
        site_N=site_N[rows_N],
        rows_N=rows_N,
        origin=table,
        wrong={name: cells_N[rows_N] for name, cells_N in typed.wrong.items()},
        digest=None if digests_N is None else code_column("digest", digests_N[rows_N]),
        split_N=None if test_N is None else test_N[rows_N].astype(np.int64),
    )


def _sites(clients_N: np.ndarray | None, num_rows: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the sites in order, and the index of the site of each row."""
    if clients_N is None:
        return ("all",), np.zeros(num_rows, np.int64)
    names = sorted({str(name) for name in set(clients_N.tolist())})
    index = {name: place for place, name in enumerate(names)}
    return tuple(names), np.array([index[str(name)] for name in clients_N.tolist()], np.int64)


def taken_as(column: CodedColumn, settings: CheckSettings, typed: TypedColumns) -> str:
    """Return the role of a column in the settings, or the kind of its content."""
    roles = {
        "target": settings.targets,
        "client": (settings.client,),
        "ignored": settings.ignore,
        "text": settings.text,
        "property": settings.properties,
        "row labels": typed.row_labels,
    }
    for role, names in roles.items():
        if column.name in names:
            return role
    if not len(column.values_L):
        return "empty"
    if len(column.values_L) == 1:
        return "constant"
    if column.name in settings.categories:
        return "category"
    if typed.is_date(column.name) or is_date(column):
        return "date"
    if is_free_text(column):
        return "text"
    if is_identifier(column):
        return "id"
    return _kind_of_values(column)


def _kind_of_values(column: CodedColumn) -> str:
    if column.is_numeric:
        return "number"
    return "category" if len(column.values_L) <= MAX_CATEGORIES else "many levels"
