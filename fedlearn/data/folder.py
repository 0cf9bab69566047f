"""Read a folder of files; the names of folders and files determine clients and split.

- ``data.csv``: one table; a column may name the client of each row
- ``data/north.csv``, ``data/south.csv``: one file per client
- ``data/north/train.csv``, ``data/north/test.csv``: one folder per client
- ``data/train.csv``, ``data/test.csv``: one table with a split
- ``data/train/north.csv``, ``data/test/north.csv``: one folder per split
- ``data/north/cat/1.png``: images by client and class
- ``data/cat/1.png``, ``data/train/cat/1.png``, ``data/north/train/cat/1.png``: images by class, with split and client
- ``data/labels.csv``, ``data/1.png``: images, and a table with a column of their names

The usual spellings of train, validation and test are splits (`fedlearn.data.split_names`). Hidden files and files of
the system have no effect.

Shapes: N rows or images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fedlearn.data.contents import Contents, clients_of_rows, mask_or_none
from fedlearn.data.folder_layout import list_files
from fedlearn.data.image_folders import ImageSettings, read_image_folders, read_labelled_images, refuse_unreadable
from fedlearn.data.images import is_image
from fedlearn.data.schema import TableSchema
from fedlearn.data.split_names import TEST, VALIDATION
from fedlearn.data.table_places import table_places
from fedlearn.data.tables import Table, concat_tables, is_table, read_table
from fedlearn.errors import DataError


def read_contents(
    path: Path,
    *,
    client_column: str | None = None,
    ignored_columns: Sequence[str] = (),
    images: ImageSettings | None = None,
    schema: TableSchema | None = None,
) -> Contents:
    """Read a path in one of the layouts above.

    Args:
        path: a file or a folder; hidden files and folders are skipped.
        client_column: column that names the client of each row; None takes the names of files and folders.
        ignored_columns: columns to leave out.
        images: settings of the reading of images; None takes the defaults.
        schema: states the encoding and the separator of text files; None detects them.

    Raises:
        DataError: the path has none of these layouts, or a file cannot be used.
        MissingExtra: Parquet or images need an optional dependency.
    """
    if not path.exists():
        raise DataError(f"scenario.path is {path}: no such file or folder\n  advice    an absolute path")
    encoding, separator = (schema.encoding, schema.separator) if schema is not None else (None, None)
    read = partial(read_table, ignored_columns=ignored_columns, encoding=encoding, separator=separator)
    if path.is_file():
        return _read_tables(path.parent, [path], read, client_column, layout="*")
    settings = images or ImageSettings()
    files = list_files(path)
    tables, pictures = [file for file in files if is_table(file)], [file for file in files if is_image(file)]
    if pictures or not tables:
        refuse_unreadable(path, files, skip=settings.skip_damaged and bool(pictures))
    if not tables and not pictures:
        fix = "a folder with one file per client, or with images in one folder per class"
        raise DataError(f"{path} has neither a CSV or Parquet file nor an image\n  advice    {fix}")
    if not pictures:
        return _read_tables(path, tables, read, client_column, layout=settings.layout)
    if tables:
        is_single = "/".join(["*"] * len(tables[0].relative_to(path).parts)) if len(tables) == 1 else None
        labels = _read_tables(path, tables, read, client_column, layout=is_single)
        return read_labelled_images(path, pictures, labels, settings, client_column=client_column)
    if client_column is not None:
        fix = "files client/class/1.png, and scenario.client=null"
        raise DataError(f"scenario.client is {client_column}, but images have no columns\n  advice    {fix}")
    return read_image_folders(path, pictures, settings)


def _read_tables(
    path: Path,
    files: Sequence[Path],
    read: Callable[[Path], Table],
    client_column: str | None,
    *,
    layout: str | None = None,
) -> Contents:
    places = table_places(path, files, layout=layout)
    names = [client for client, _ in places]
    tables = [read(file) for file in files]
    if client_column is None and any(names) and not all(names):
        unassigned = files[names.index("")].name
        raise DataError(
            f"{unassigned} names no client, but other files do\n"
            "  advice    one folder per client, or scenario.layout=client, if each file is a client"
        )
    table = concat_tables(tables)
    sizes = [len(part) for part in tables]
    clients = np.repeat(np.array(names, object), sizes) if any(names) else None
    splits_N = np.repeat(np.array([split or "" for _, split in places], object), sizes)
    contents = Contents(
        table=table,
        clients=clients if client_column is None else clients_of_rows(table, client_column),
        test_N=mask_or_none(splits_N == TEST),
        validation_N=mask_or_none(splits_N == VALIDATION),
    )
    note = f"splits from names of files ({', '.join(sorted({split for _, split in places if split}))})"
    return replace(contents, notes=(note,)) if (splits_N != "").any() else contents
