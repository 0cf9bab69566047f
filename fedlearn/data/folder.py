"""Read a folder of files; the names of folders and files determine clients and split.

- ``data.csv``: one table; a column may name the client of each row
- ``data/north.csv``, ``data/south.csv``: one file per client
- ``data/north/train.csv``, ``data/north/test.csv``: one folder per client
- ``data/train.csv``, ``data/test.csv``: one table with a split
- ``data/north/cat/1.png``: images by client and class
- ``data/cat/1.png``, or ``data/train/cat/1.png``: images by class

Shapes: N rows or images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fedlearn.data.tables import Table, concat_tables, is_table, read_table, table_stem, to_categories
from fedlearn.errors import DataError, MissingExtra

SPLITS = ("train", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")  # modes of Pillow
CLASS_COLUMN = "class"  # column with the folder name of each image


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Hold the contents of a folder.

    Args:
        table: one row per example; for images, the column of classes only.
        clients: name of the client of each row; None if file names do not say it.
        test_N: mask of the held-out rows; None if file names do not say it.
        images: ``(N, height, width, channels)`` uint8, or None.
    """

    table: Table
    clients: np.ndarray | None
    test_N: np.ndarray | None
    images: np.ndarray | None = None


def read_contents(
    path: Path, *, client_column: str | None = None, ignored_columns: Sequence[str] = (), image_size: int | None = None
) -> Contents:
    """Read a path in one of the layouts above.

    Args:
        path: a file or a folder; hidden files and folders are skipped.
        client_column: column that names the client of each row; None takes the names of files and folders.
        ignored_columns: columns to leave out.
        image_size: height and width to which images are scaled, in pixels; None keeps their size.

    Raises:
        DataError: the path has none of these layouts, or a file cannot be used.
        MissingExtra: Parquet or images need an optional dependency.
    """
    if not path.exists():
        raise DataError(f"scenario.path is {path}: no such file or folder\n  try       an absolute path")
    if path.is_file():
        return _read_tables([path], [""], client_column, ignored_columns)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
    tables = [file for file in files if is_table(file)]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if bool(tables) == bool(images):
        content = "both tables and images" if tables else "neither a CSV or Parquet file nor an image"
        fix = "a folder with one file per client, or with images in one folder per class"
        raise DataError(f"{path} has {content}\n  try       {fix}")
    if images and client_column is not None:
        fix = "files client/class/1.png, and scenario.client=null"
        raise DataError(f"scenario.client is {client_column}, but images have no columns\n  try       {fix}")
    if images:
        return _read_image_folders(path, images, image_size)
    return _read_tables(tables, [_client_of_file(path, file) for file in tables], client_column, ignored_columns)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _client_of_file(path: Path, file: Path) -> str:
    """Return the client that the path of a table names; empty for the name of a split."""
    *folders, _ = file.relative_to(path).parts
    if len(folders) > 1:
        fix = "north.csv or north/train.csv, for a client with the name north"
        raise DataError(f"{file.relative_to(path)} is too deep in the folder to name its client\n  try       {fix}")
    if folders:
        return folders[0]
    return "" if table_stem(file) in SPLITS else table_stem(file)


def _read_tables(
    files: Sequence[Path], client_of_file: Sequence[str], client_column: str | None, ignored_columns: Sequence[str]
) -> Contents:
    tables = [read_table(file, ignored_columns=ignored_columns) for file in files]
    if client_column is None and any(client_of_file) and not all(client_of_file):
        unassigned = files[[bool(name) for name in client_of_file].index(False)].name
        raise DataError(
            f"{unassigned} names no client, but other files do\n  try       one folder per client, or another name"
        )
    table = concat_tables(tables)
    sizes = [len(part) for part in tables]
    clients = np.repeat(np.array(client_of_file, object), sizes) if any(client_of_file) else None
    if client_column is not None:
        clients = clients_of_rows(table, client_column)
    is_test = np.repeat([table_stem(file) == "test" for file in files], sizes)
    return Contents(table=table, clients=clients, test_N=is_test if is_test.any() else None)


def clients_of_rows(table: Table, column: str) -> np.ndarray:
    """Return the client of each row, from the column that names it.

    Raises:
        DataError: there is no such column, or a cell is missing.
    """
    clients_N = to_categories(table.column(column, "scenario.client"))
    missing_N = np.array([client is None for client in clients_N])
    table.refuse(missing_N, column, "missing, but this column names the client", "removing the row, or naming a client")
    return clients_N


def _read_image_folders(path: Path, files: Sequence[Path], size: int | None) -> Contents:
    folders = [file.relative_to(path).parts[:-1] for file in files]
    has_splits = {parts[0] for parts in folders if parts} <= {*SPLITS}
    depths = {len(parts) - has_splits for parts in folders}
    if depths not in ({1}, {2}):
        fix = "client/class/1.png for all images, or class/1.png, or train/class/1.png and test/class/1.png"
        raise DataError(f"{path} has images at different depths, expected folders of one depth\n  try       {fix}")
    origins = tuple((str(file.relative_to(path)), 1, 1) for file in files)
    classes = np.array([parts[-1] for parts in folders], object)
    is_test = np.array([parts[0] == "test" for parts in folders])
    return Contents(
        table=Table({CLASS_COLUMN: classes}, origins),
        clients=np.array([parts[has_splits] for parts in folders], object) if depths == {2} else None,
        test_N=is_test if has_splits and is_test.any() else None,
        images=read_images(files, [name for name, _, _ in origins], size=size),
    )


def read_images(files: Sequence[Path | BinaryIO], names: Sequence[str], *, size: int | None) -> np.ndarray:
    """Read images as ``(N, height, width, channels)`` uint8. All are grey or all are in colour, like the first image.

    Args:
        files: images in any format of Pillow.
        names: names of these files, for messages.
        size: height and width to which images are scaled, in pixels; None keeps their size.

    Raises:
        DataError: a file is not an image, or differs in size from the first image.
        MissingExtra: Pillow is not installed.
    """
    read = partial(_read_image, size=(size, size) if size else None)
    first = read(files[0], names[0])
    pixels = np.empty((len(files), *first.shape), np.uint8)
    for number, (file, name) in enumerate(zip(files, names, strict=True)):
        image = read(file, name, channels=first.shape[-1])
        if image.shape != first.shape:
            shapes = " pixels, but the first image has ".join(
                f"{array.shape[1]} x {array.shape[0]}" for array in (image, first)
            )
            raise DataError(f"{name} has {shapes}\n  try       scenario.image_size={min(first.shape[:2])}")
        pixels[number] = image
    return pixels


def list_images(path: Path) -> list[Path]:
    """Return the image at a path, or the images of a folder in order of their names."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]


def read_image_files(files: Sequence[Path], shape: Sequence[int]) -> np.ndarray:
    """Read images for a model with inputs of ``shape``, as ``(N, *shape)`` uint8, scaled to this shape.

    Args:
        files: images in any format of Pillow.
        shape: height, width, channels.

    Raises:
        DataError: a file cannot be read as an image.
        MissingExtra: Pillow is not installed.
    """
    height, width, channels = shape
    return np.stack([_read_image(file, file.name, size=(width, height), channels=channels) for file in files])


def _read_image(
    file: Path | BinaryIO, name: str, *, size: tuple[int, int] | None, channels: int | None = None
) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("reading images", "data") from error
    try:
        with Image.open(file) as opened:
            is_grey = channels == 1 if channels else opened.mode in GREY_MODES
            image: Any = opened.convert("L" if is_grey else "RGB")
            image = image.resize(size, Image.Resampling.BILINEAR) if size else image
            pixels = np.asarray(image, np.uint8)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read as an image\n  try       removing the file") from error
    return pixels[..., None] if is_grey else pixels
