"""Read a file or folder as a run does, and check it. Faults that end a run are flags here, so all appear at once.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fedlearn.data.contents import Contents
from fedlearn.data.data_check.advice import override
from fedlearn.data.data_check.check import check_data
from fedlearn.data.data_check.records import DataCheck, Flag
from fedlearn.data.data_check.settings import CheckSettings
from fedlearn.data.data_check.unit_flags import join_names
from fedlearn.data.folder import read_contents
from fedlearn.data.hugging_face import HUB_PREFIX, read_hub
from fedlearn.data.tables import Table, is_table, read_table, table_stem, to_categories
from fedlearn.errors import DataError, FedlearnError, did_you_mean


def inspect_path(path: str, settings: CheckSettings) -> DataCheck:
    """Return the data check of a file, a folder, or ``hf://owner/name``.

    Raises:
        DataError: there is no such path, no file can be read, or a setting names no column.
        MissingExtra: Parquet or images need an optional dependency.
    """
    if path.startswith(HUB_PREFIX):
        contents = read_hub(path, client_column=settings.client, ignored_columns=())
        return check_contents(contents, settings, source=path)
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(
            f"PATH is {path}: no such file or folder\n  expected  a file or folder\n  try       ls {_parent(place)}"
        )
    try:
        return check_contents(read_contents(place, client_column=settings.client), settings, source=place.name)
    except DataError as error:
        return _check_separate_files(place, settings, error)


def check_contents(
    contents: Contents, settings: CheckSettings, *, source: str, flags: Iterable[Flag] = ()
) -> DataCheck:
    """Return the data check of contents that were read.

    Raises:
        DataError: a setting names no column.
    """
    _require_columns(contents.table, settings)
    return check_data(
        contents.table, settings, source=source, clients_N=contents.clients, test_N=contents.test_N, flags=flags
    )


def _check_separate_files(path: Path, settings: CheckSettings, error: DataError) -> DataCheck:
    """Check each table on its own account after `read_contents` refused the folder with ``error``."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and is_table(file))
    tables: list[tuple[Path, Table]] = []
    flags: list[Flag] = []
    for file in files:
        try:
            tables.append((file, read_table(file)))
        except FedlearnError as fault:
            flags.append(_unreadable(fault, settings))
    if not tables:
        raise error
    flags = flags or [] if _columns_differ([table for _, table in tables]) else flags or [_unreadable(error, settings)]
    flags += _flag_columns(tables, settings)
    table = _fill_columns([table for _, table in tables])
    clients_N = _clients(path, tables, table, settings)
    splits = [table_stem(file) == "test" for file, _ in tables]
    test_N = np.repeat(splits, [len(part) for _, part in tables]) if any(splits) and not all(splits) else None
    contents = Contents(table=table, clients=clients_N, test_N=test_N)
    return check_contents(contents, settings, source=path.name, flags=flags)


def _require_columns(table: Table, settings: CheckSettings) -> None:
    names = {"target": [settings.target], "client": [settings.client], "ignore": settings.ignore, "text": settings.text}
    for setting, values in names.items():
        for name in values:
            if name is not None and name not in table.columns:
                closest = did_you_mean(name, table.columns) or next(iter(table.columns))
                value = [closest] if setting == "ignore" else closest
                raise DataError(
                    f"{setting} is {name}\n  expected  one of the columns {', '.join(table.columns)}\n"
                    f"  try       {override(setting, value)}"
                )


def _unreadable(fault: FedlearnError, settings: CheckSettings) -> Flag:
    first, *rest = str(fault).split("\n")
    fix = next((line.split(maxsplit=1)[1] for line in rest if line.split()[:1] == ["try"]), settings.listing)
    return Flag(kind="unreadable", message=first, advice=fix)


def _columns_differ(tables: Sequence[Table]) -> bool:
    return len({frozenset(table.columns) for table in tables}) > 1


def _flag_columns(tables: Sequence[tuple[Path, Table]], settings: CheckSettings) -> list[Flag]:
    """Return a flag with all columns that some files lack."""
    names = dict.fromkeys(name for _, table in tables for name in table.columns)
    partial = [name for name in names if any(name not in table.columns for _, table in tables)]
    parts = []
    for name in partial:
        having = [file.name for file, table in tables if name in table.columns]
        lacking = [file.name for file, table in tables if name not in table.columns]
        part = f"only in {join_names(having)}" if len(having) <= len(lacking) else f"not in {join_names(lacking)}"
        parts.append(f"{name} is {part}")
    if not parts:
        return []
    advice = settings.without(*(name for name in partial if name not in (settings.target, settings.client)))
    return [Flag(kind="columns", message=f"the files have different columns: {'; '.join(parts)}", advice=advice)]


def _fill_columns(tables: Sequence[Table]) -> Table:
    """Append tables to each other; columns that a table lacks are missing there."""
    names = dict.fromkeys(name for table in tables for name in table.columns)
    columns = {}
    for name in names:
        parts = [table.columns.get(name, np.full(len(table), None, object)) for table in tables]
        if len({part.dtype for part in parts}) > 1:
            parts = [part if part.dtype == object else to_categories(part) for part in parts]
        columns[name] = np.concatenate(parts)
    return Table(columns, tuple(origin for table in tables for origin in table.origins))


def _clients(
    path: Path, tables: Sequence[tuple[Path, Table]], table: Table, settings: CheckSettings
) -> np.ndarray | None:
    if settings.client is not None and settings.client in table.columns:
        return np.array([cell or "(missing)" for cell in to_categories(table.columns[settings.client])], object)
    if len(tables) < 2 or settings.client is not None:
        return None
    names = [str(file.relative_to(path).parent) if file.parent != path else table_stem(file) for file, _ in tables]
    return np.repeat(np.array(names, object), [len(part) for _, part in tables])


def _parent(path: Path) -> Path:
    return next((folder for folder in path.parents if folder.is_dir()), Path("."))
