"""Read a file or folder as a run does, and check it. Faults that end a run are flags here, so all appear at once.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlearn.advice import assignment
from fedlearn.data.contents import Contents, mask_or_none
from fedlearn.data.data_check.check import check_data, refusal
from fedlearn.data.data_check.image_check import inspect_images
from fedlearn.data.data_check.records import DataCheck, Flag
from fedlearn.data.data_check.settings import CheckSettings, check_settings
from fedlearn.data.data_check.typed_columns import TypedColumns, type_leniently
from fedlearn.data.data_check.unit_flags import join_names
from fedlearn.data.folder import read_contents
from fedlearn.data.folder_layout import list_files
from fedlearn.data.hugging_face import HUB_PREFIX, read_hub
from fedlearn.data.image_folders import ImageSettings
from fedlearn.data.images import is_image
from fedlearn.data.levels import to_categories
from fedlearn.data.split_names import TEST
from fedlearn.data.table_places import table_places
from fedlearn.data.table_settings import TableSettings
from fedlearn.data.tables import Table, is_table, read_table
from fedlearn.data.typed_tables import Reading
from fedlearn.errors import DataError, FedlearnError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Hold a data check and the columns that it read.

    Args:
        check: summary and flags.
        typed: columns with their types; None for images.
    """

    check: DataCheck
    typed: TypedColumns | None = None


def inspect_path(path: str, stated: TableSettings, *, images: ImageSettings | None = None) -> Inspection:
    """Check a file, a folder, or ``hf://owner/name``.

    Args:
        path: path as the user typed it.
        stated: settings about columns, as in ``scenario=folder``.
        images: settings of the reading of images; None takes the defaults.

    Raises:
        DataError: there is no such path, no file can be read, or a setting names no column.
        MissingExtra: Parquet or images need an optional dependency.
    """
    settings = check_settings(stated, path, is_sampled=False)
    if path.startswith(HUB_PREFIX):
        contents = read_hub(path, client_column=settings.client, ignored_columns=())
        return check_contents(contents, settings, stated.reading, source=path)
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(
            f"PATH is {path}: no such file or folder\n  expected  a file or folder\n  advice    ls {_parent(place)}"
        )
    if place.is_dir() and any(map(is_image, list_files(place))):
        return Inspection(check=inspect_images(place, settings, images or ImageSettings()))
    try:
        contents = read_contents(place, client_column=settings.client)
    except DataError as error:
        return _check_separate_files(place, settings, stated.reading, error)
    return check_contents(contents, settings, stated.reading, source=place.name)


def check_contents(
    contents: Contents, settings: CheckSettings, reading: Reading, *, source: str, flags: Iterable[Flag] = ()
) -> Inspection:
    """Check contents that were read.

    Raises:
        DataError: a setting names no column, or the schema has other columns.
    """
    _require_columns(contents.table, settings)
    typed = type_leniently(contents.table, reading)
    clients_N, test_N = contents.clients, contents.test_N
    check = check_data(typed, settings, source=source, clients_N=clients_N, test_N=test_N, flags=flags)
    return Inspection(check=check, typed=typed)


def _check_separate_files(path: Path, settings: CheckSettings, reading: Reading, error: DataError) -> Inspection:
    """Check each table on its own account after `read_contents` refused the folder with ``error``."""
    files = [path] if path.is_file() else [file for file in list_files(path) if is_table(file)]
    tables: list[tuple[Path, Table]] = []
    flags: list[Flag] = []
    for file in files:
        try:
            tables.append((file, read_table(file)))
        except FedlearnError as fault:
            flags.append(refusal("", str(fault), settings))
    if not tables:
        raise error
    flags = (
        flags or [] if _columns_differ([table for _, table in tables]) else flags or [refusal("", str(error), settings)]
    )
    flags += _flag_columns(tables, settings)
    table = _fill_columns([table for _, table in tables])
    places = _places(path, [file for file, _ in tables])
    sizes = [len(part) for _, part in tables]
    splits_N = np.repeat(np.array([split or "" for _, split in places], object), sizes)
    clients_N = np.repeat(np.array([client for client, _ in places], object), sizes)
    if settings.client is not None and settings.client in table.columns:
        clients_N = np.array([cell or "(missing)" for cell in to_categories(table.columns[settings.client])], object)
    has_clients = settings.client is not None or (clients_N != "").all()
    test_N = splits_N == TEST
    contents = Contents(table=table, clients=clients_N if has_clients else None, test_N=mask_or_none(test_N))
    return check_contents(contents, settings, reading, source=path.name, flags=flags)


def _require_columns(table: Table, settings: CheckSettings) -> None:
    names = {"target": settings.targets, "client": [settings.client], "ignore": settings.ignore, "text": settings.text}
    for setting, values in names.items():
        for name in values:
            if name is not None and name not in table.columns:
                closest = did_you_mean(name, table.columns) or next(iter(table.columns))
                value = [closest] if setting == "ignore" else closest
                raise DataError(
                    f"{setting} is {name}\n  expected  one of the columns {', '.join(table.columns)}\n"
                    f"  try       {assignment(setting, value)}"
                )


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
    advice = settings.without(*(name for name in partial if name not in (*settings.targets, settings.client)))
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


def _places(path: Path, files: Sequence[Path]) -> list[tuple[str, str | None]]:
    """Return the client and the split of each file; the client is the path of a file that has no clear place."""
    try:
        return table_places(path if path.is_dir() else path.parent, files)
    except FedlearnError:
        return [(str(file.relative_to(path)), None) for file in files]


def _parent(path: Path) -> Path:
    return next((folder for folder in path.parents if folder.is_dir()), Path("."))
