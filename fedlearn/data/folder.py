"""A folder of one's own: who has what is read from the names of folders and files.

======================================  =================================================
``data.csv``                            one table; a column may say whose row it is
``data/north.csv``, ``data/south.csv``  a file for each client
``data/north/train.csv``, ``test.csv``  a folder for each client
``data/train.csv``, ``data/test.csv``   one table, split already
``data/north/cat/1.png``                images, by client and class
``data/cat/1.png``                      images, by class (``data/train/cat/1.png`` too)
======================================  =================================================

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
GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")  # Pillow's modes
CLASS_COLUMN = "class"  # the column that stands for an image's folder


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Hold the contents of a folder.

    Args:
        table: a row for each example; of images, their class only.
        clients: whose each row is, by name; None where names do not say.
        test_N: which rows are held out; None where names do not say.
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
        path: a file or a folder; hidden files and folders in it are passed over.
        client_column: the column that says whose row it is; None goes by the names of files and folders.
        ignored_columns: columns to leave out.
        image_size: to which images are scaled, height and width alike; None takes them as they are.

    Raises:
        DataError: it is in none of the layouts, or a file cannot be used.
        MissingExtra: Parquet or images need an optional dependency.
    """
    if not path.exists():
        raise DataError(f"scenario.path is {path}: there is no such file or folder\n  try       an absolute path")
    if path.is_file():
        return _tables([path], [""], client_column, ignored_columns)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    tables = [file for file in files if is_table(file)]
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if bool(tables) == bool(pictures):
        found = "both tables and images" if tables else "neither a CSV or Parquet file nor an image"
        fix = "a folder with a file for each client, or with images in folders by class"
        raise DataError(f"{path} holds {found}\n  try       {fix}")
    if pictures and client_column is not None:
        fix = "folders client/class/1.png, and scenario.client=null"
        raise DataError(f"scenario.client is {client_column}, but images have no columns\n  try       {fix}")
    if pictures:
        return _pictures(path, pictures, image_size)
    return _tables(tables, [_owner(path, file) for file in tables], client_column, ignored_columns)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _owner(path: Path, file: Path) -> str:
    """The client that a table's place names; empty for one that names a side only."""
    *folders, _ = file.relative_to(path).parts
    if len(folders) > 1:
        fix = "north.csv or north/train.csv, for a client called north"
        raise DataError(f"{file.relative_to(path)} lies too deep to say which client has it\n  try       {fix}")
    if folders:
        return folders[0]
    return "" if table_stem(file) in SPLITS else table_stem(file)


def _tables(files: Sequence[Path], owners: Sequence[str], client: str | None, ignore: Sequence[str]) -> Contents:
    tables = [read_table(file, ignored_columns=ignore) for file in files]
    if client is None and any(owners) and not all(owners):
        stray = files[[bool(owner) for owner in owners].index(False)].name
        raise DataError(f"{stray} lies beside files of clients\n  try       a folder for each client, or another name")
    table = concat_tables(tables)
    sizes = [len(part) for part in tables]
    clients = np.repeat(np.array(owners, object), sizes) if any(owners) else None
    if client is not None:
        clients = clients_of_rows(table, client)
    sides = np.repeat([table_stem(file) == "test" for file in files], sizes)
    return Contents(table=table, clients=clients, test_N=sides if sides.any() else None)


def clients_of_rows(table: Table, column: str) -> np.ndarray:
    """Whose each row is by a column that says so; `DataError` where it does not."""
    owners_N = to_categories(table.column(column, "scenario.client"))
    nobody_N = np.array([owner is None for owner in owners_N])
    table.refuse(nobody_N, column, "missing, but it says whose row it is", "removing the row, or naming a client")
    return owners_N


def _pictures(path: Path, files: Sequence[Path], size: int | None) -> Contents:
    places = [file.relative_to(path).parts[:-1] for file in files]
    split = {place[0] for place in places if place} <= {*SPLITS}
    depths = {len(place) - split for place in places}
    if depths not in ({1}, {2}):
        fix = "client/class/1.png for all of them, or class/1.png, or train/class/1.png and test/class/1.png"
        raise DataError(f"{path} does not hold its images in folders of one depth\n  try       {fix}")
    origins = tuple((str(file.relative_to(path)), 1, 1) for file in files)
    classes = np.array([place[-1] for place in places], object)
    sides = np.array([place[0] == "test" for place in places])
    return Contents(
        table=Table({CLASS_COLUMN: classes}, origins),
        clients=np.array([place[split] for place in places], object) if depths == {2} else None,
        test_N=sides if split and sides.any() else None,
        images=read_images(files, [name for name, _, _ in origins], size=size),
    )


def read_images(files: Sequence[Path | BinaryIO], names: Sequence[str], *, size: int | None) -> np.ndarray:
    """Images ``(N, height, width, channels)`` uint8; all grey or all in colour, as the first one is.

    Args:
        files: of images, in any format that Pillow reads.
        names: of these, for messages.
        size: to which they are scaled, height and width alike; None takes them as they are.

    Raises:
        DataError: a file is no image, or of another size than the first.
        MissingExtra: Pillow is absent.
    """
    pixels_of = partial(_read_image, size=(size, size) if size else None)
    first = pixels_of(files[0], names[0])
    pixels = np.empty((len(files), *first.shape), np.uint8)
    for number, (file, name) in enumerate(zip(files, names, strict=True)):
        image = pixels_of(file, name, channels=first.shape[-1])
        if image.shape != first.shape:
            shapes = " pixels, but the first image has ".join(f"{of.shape[1]} x {of.shape[0]}" for of in (image, first))
            raise DataError(f"{name} has {shapes}\n  try       scenario.image_size={min(first.shape[:2])}")
        pixels[number] = image
    return pixels


def list_images(path: Path) -> list[Path]:
    """The image there, or those of a folder in the order of their names."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]


def read_images_for_shape(shape: Sequence[int], path: Path) -> np.ndarray:
    """New images for a model of ``shape`` (height, width, channels): ``(N, *shape)`` uint8, scaled to it.

    Raises:
        DataError: there is no image at that place, or one cannot be read.
        MissingExtra: Pillow is absent.
    """
    files, (height, width, channels) = list_images(path), shape
    if not files:
        raise DataError(f"{path} is no image, nor a folder of images\n  try       a {', '.join(IMAGE_SUFFIXES)} file")
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
            grey = channels == 1 if channels else opened.mode in GREY_MODES
            image: Any = opened.convert("L" if grey else "RGB")
            image = image.resize(size, Image.Resampling.BILINEAR) if size else image
            pixels = np.asarray(image, np.uint8)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read as an image\n  try       removing the file") from error
    return pixels[..., None] if grey else pixels
