"""Divide the rows of each client into training rows and held-out rows: by a share, a column, groups or clients.

Shapes: N rows.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlearn.data.contents import Contents, mask_or_none
from fedlearn.data.from_arrays import split_rows
from fedlearn.data.levels import to_categories, to_category
from fedlearn.data.schema import TableSchema
from fedlearn.data.split_names import TEST, TRAIN, VALIDATION, split_of
from fedlearn.data.tables import Table
from fedlearn.errors import DataError, did_you_mean, require

VALIDATION_USES = (TRAIN, TEST, "none")


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """Hold the settings of the split.

    Args:
        split_column: column with ``train``, ``validation`` or ``test`` of each row, in any usual spelling.
        group_column: column with the group of each row, e.g. the patient. A group is in one part of the split.
        validation: use of validation rows: ``train``, ``test`` or ``none``. None is ``none`` beside a test split, and
            ``test`` without it.
        held_out_clients: names of clients that never train. All their rows are held out.
        held_out_groups: names of groups that are held out in any case.
    """

    split_column: str | None = None
    group_column: str | None = None
    validation: str | None = None
    held_out_clients: tuple[str, ...] = ()
    held_out_groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        is_known = self.validation in (None, *VALIDATION_USES)
        require(is_known, "validation", self.validation, "train, test, none or null", "validation=train")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that are no features."""
        return tuple(name for name in (self.split_column, self.group_column) if name is not None)


@dataclass(frozen=True, kw_only=True)
class RowSplit:
    """Hold the rows of each part of the split.

    Args:
        train: training rows of each client.
        test: held-out rows of each client.
        held_out_clients: numbers of the clients that never train, and have held-out rows.
        notes: statements for the header.
    """

    train: list[np.ndarray]
    test: list[np.ndarray]
    held_out_clients: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def split_settings_of(
    schema: TableSchema | None,
    *,
    split: str | None,
    group: str | None,
    validation: str | None,
    held_out_clients: Sequence[Any],
) -> SplitSettings:
    """Return the settings of the split. A schema fills in settings that are not given.

    Args:
        schema: schema of the table; None without a schema.
        split: column of the split.
        group: column of the groups.
        validation: use of validation rows.
        held_out_clients: names of clients that never train.
    """
    split_column = split or (schema and schema.split)
    group_column = group or (schema and schema.group)
    stated = schema.hold_out if schema is not None else ()
    return SplitSettings(
        split_column=split_column or None,
        group_column=group_column or None,
        validation=validation,
        held_out_clients=tuple(map(to_category, held_out_clients or (() if group_column else stated))),
        held_out_groups=stated if group_column else (),
    )


def split_contents(
    contents: Contents,
    rows: Sequence[np.ndarray],
    y_N: np.ndarray,
    settings: SplitSettings,
    *,
    names: Sequence[str],
    test_share: float,
    seed: int,
) -> RowSplit:
    """Divide the rows of each client.

    Args:
        contents: rows or images, perhaps with splits and groups.
        rows: rows of each client.
        y_N: targets, for a stratified split.
        settings: settings of the split.
        names: names of the clients; empty for clients without names.
        test_share: share that each client holds out without a stated split.
        seed: seed of the split.

    Raises:
        DataError: a column has other values than splits, or a group is in both parts.
        SettingError: a held-out client does not exist.
    """
    contents = contents if settings.split_column is None else _with_split_column(contents, settings.split_column)
    groups_N = _groups(contents, settings.group_column)
    held_out = _held_out_clients(settings.held_out_clients, names)
    left_out_N, test_N, notes = _parts(contents, settings.validation)
    rows = [*rows] if not left_out_N.any() else _by_mask(rows, ~left_out_N)
    if test_N is None and groups_N is None:
        train, test = split_rows(rows, y_N, test_share=test_share, seed=seed)
    else:
        test_N = _groups_to_hold_out(groups_N, test_share, seed) if test_N is None else test_N
        if groups_N is not None and settings.held_out_groups:
            test_N = test_N | np.isin(groups_N.astype(str), settings.held_out_groups)
        train, test = _by_mask(rows, ~test_N), _by_mask(rows, test_N)
    for number in held_out:
        train[number], test[number] = rows[number][:0], rows[number]
    if groups_N is not None:
        notes = (*notes, _group_note(groups_N, train, test, settings))
    alone = [number for number in range(len(rows)) if len(test[number]) and not len(train[number])]
    if names and alone:
        shown = ", ".join(f"{names[number]} ({len(test[number])} rows)" for number in alone)
        notes = (*notes, f"never trains: {shown}")
    return RowSplit(train=train, test=test, held_out_clients=tuple(alone) if names else (), notes=notes)


def held_out_table(table: Table, test: Sequence[np.ndarray], names: Sequence[str]) -> str:
    """Return the held-out rows as CSV: client, file, and the numbers of the rows as ranges, e.g. ``2-4 9``.

    The first row of a text file is its header. An image has no row number.

    >>> table = Table({}, (("a.csv", 2, 10), ("b.csv", 2, 5)))
    >>> held_out_table(table, [np.array([0, 1, 4, 10])], ["north"]).splitlines()
    ['client,file,rows', 'north,a.csv,2-3 6', 'north,b.csv,2']
    """
    ends = np.cumsum([count for _, _, count in table.origins])
    starts = ends - [count for _, _, count in table.origins]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["client", "file", "rows"])
    for client, rows in enumerate(test):
        rows = np.sort(rows)
        sources = np.searchsorted(ends, rows, side="right")
        for source in np.unique(sources).tolist():
            file, first, count = table.origins[source]
            numbers = rows[sources == source] - starts[source] + first
            name = names[client] if client < len(names) else client
            lines.writerow([name, file, "" if count == first == 1 else _ranges(numbers)])
    return text.getvalue()


def _ranges(numbers: np.ndarray) -> str:
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _with_split_column(contents: Contents, column: str) -> Contents:
    cells_N = to_categories(contents.table.column(column, "scenario.split"))
    splits_N = np.array([None if cell is None else split_of(cell) for cell in cells_N], object)
    fix = "train, validation or test in this column, or scenario.split=null"
    unknown_N = np.array([split is None for split in splits_N], bool)
    contents.table.refuse(unknown_N, column, "not a usual name of a split", fix)
    return replace(contents, test_N=mask_or_none(splits_N == TEST), validation_N=mask_or_none(splits_N == VALIDATION))


def _groups(contents: Contents, column: str | None) -> np.ndarray | None:
    if column is None:
        return contents.groups
    groups_N = to_categories(contents.table.column(column, "scenario.group"))
    missing_N = np.array([group is None for group in groups_N], bool)
    contents.table.refuse(missing_N, column, "missing, but this column names the group", "a group in this cell")
    return groups_N


def _held_out_clients(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    for name in wanted:
        known = ", ".join(names) or "clients with names, and partition=natural"
        fix = f"'held_out_clients=[{did_you_mean(name, names) or (names[-1] if names else 'null')}]'"
        require(name in names, "held_out_clients", list(wanted), f"some of {known}", fix)
    fits = not wanted or set(names) > set(wanted)
    require(fits, "held_out_clients", list(wanted), "fewer names, because a client must train", "held_out_clients=null")
    return [names.index(name) for name in wanted]


def _parts(contents: Contents, validation: str | None) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Return the mask of the rows without a part, the mask of the test rows, and notes."""
    nothing_N = np.zeros(len(contents.table), bool)
    validation_N, test_N = contents.validation_N, contents.test_N
    if validation_N is None:
        return nothing_N, test_N, ()
    use = validation or ("test" if test_N is None else "none")
    note = f"{int(validation_N.sum())} validation rows {'are left out' if use == 'none' else f'count as {use} rows'}"
    if use == TEST:
        return nothing_N, validation_N | (nothing_N if test_N is None else test_N), (note,)
    return (validation_N if use == "none" else nothing_N), test_N, (note,)


def _by_mask(rows: Sequence[np.ndarray], mask_N: np.ndarray) -> list[np.ndarray]:
    return [rows_k[mask_N[rows_k]] for rows_k in rows]


def _groups_to_hold_out(groups_N: np.ndarray | None, test_share: float, seed: int) -> np.ndarray:
    """Return the mask of the rows of the held-out groups.

    The hash of its name decides on a group. So a group is in the same part at all clients, also at nodes that do not
    see the rows of each other.
    """
    if groups_N is None:
        return np.zeros(0, bool)
    names, group_N = np.unique(groups_N.astype(str), return_inverse=True)
    digests = [hashlib.sha256(f"{seed}\x1f{name}".encode()).digest() for name in names.tolist()]
    shares = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])
    return np.asarray((shares < test_share)[group_N])


def _group_note(
    groups_N: np.ndarray, train: Sequence[np.ndarray], test: Sequence[np.ndarray], settings: SplitSettings
) -> str:
    """Return the number of held-out groups.

    Raises:
        DataError: rows of a group are in both parts.
    """
    trained = {group for rows in train for group in groups_N[rows].tolist()}
    held_out = {group for rows in test for group in groups_N[rows].tolist()}
    both, column = len(trained & held_out), settings.group_column or "folders"
    if both:
        cause = "held_out_clients" if settings.held_out_clients else "split"
        raise DataError(
            f"{both} groups of {column} have training rows and held-out rows\n"
            f"  expected  each group in one part\n  advice    scenario.{cause}=null"
        )
    return f"{len(held_out)} of {len(trained | held_out)} groups of {column} held out"


def leakage_note(images: np.ndarray, split: RowSplit) -> tuple[str, ...]:
    """Return a warning if held-out images are equal to training images; else nothing."""
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
    trained = {digests[row] for rows in split.train for row in rows.tolist()}
    held_out = [digests[row] for rows in split.test for row in rows.tolist()]
    count = sum(digest in trained for digest in held_out)
    return (f"warning: {count} of {len(held_out)} held-out images are also training images",) if count else ()
