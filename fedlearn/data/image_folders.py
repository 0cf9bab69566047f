"""Read folders of images. Folders or a table of labels name the class, the client and the split of each image.

Shapes: N images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedlearn.data.contents import CLASS_COLUMN, Contents, clients_of_rows, mask_or_none
from fedlearn.data.folder_layout import (
    CLASS,
    CLIENT,
    GROUP,
    SPLIT,
    FolderLayout,
    infer_layout,
    label_layout,
    split_levels,
)
from fedlearn.data.images import UNREADABLE_SUFFIXES, ImageArrays, read_images, unreadable_kind
from fedlearn.data.levels import to_categories
from fedlearn.data.split_names import SPLITS, TEST, VALIDATION
from fedlearn.data.tables import Table, take_rows
from fedlearn.errors import DataError, is_count, require

MAX_NAMED = 5  # files that a message names


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """Hold the settings of the reading of images.

    Args:
        size: height and width to which images are scaled, in pixels; None keeps their size.
        channels: 1 for grey, 3 for colour; None is colour if an image is in colour.
        skip_damaged: whether images that cannot be read are left out.
        layout: meaning of each folder level, e.g. ``client/split/class``; None infers it.
        clients: names of all clients, if they are known.
        classes: names of all classes, if they are known.
        file_column: column with the file names of images in a table of labels; None finds it.
    """

    size: int | None = None
    channels: int | None = None
    skip_damaged: bool = False
    layout: str | None = None
    clients: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    file_column: str | None = None

    def __post_init__(self) -> None:
        is_size = self.size is None or is_count(self.size)
        require(is_size, "image_size", self.size, "a whole number of pixels >= 1", "image_size=64")
        is_known = self.channels in (None, 1, 3)
        require(is_known, "image_channels", self.channels, "1 (grey), 3 (colour) or null", "image_channels=1")


def read_image_folders(path: Path, files: Sequence[Path], settings: ImageSettings) -> Contents:
    """Read images whose folders name their class.

    Args:
        path: the folder.
        files: images below it.
        settings: settings of the reading.

    Raises:
        DataError: the layout is not clear, or images cannot be used.
        MissingExtra: Pillow is not installed.
    """
    parts = [file.relative_to(path).parts[:-1] for file in files]
    known = {"clients": settings.clients, "classes": settings.classes}
    layout = infer_layout(parts, layout=settings.layout, path=str(path), **known)
    if CLASS not in layout:
        fix = "scenario.layout=client/class, or a table with the class of each image"
        raise DataError(f"scenario.layout={layout} has no level class\n  expected  a class\n  try       {fix}")
    images = _read(path, files, settings)
    parts = [parts[place] for place in images.kept]
    columns = {level: [layout.names(folders, level) for folders in parts] for level in layout.levels if level != "*"}
    for level, names in ((CLASS, settings.classes), (CLIENT, settings.clients)):
        _refuse_case_variants(columns.get(level, []), names, level)
    splits = split_levels(layout, parts, str(path)) if SPLIT in layout else []
    origins = tuple((name, 1, 1) for name in images.names)
    return Contents(
        table=Table({CLASS_COLUMN: np.array(columns[CLASS], object)}, origins),
        clients=_objects(columns.get(CLIENT)),
        groups=_objects(columns.get(GROUP)),
        test_N=mask_or_none(np.array([split == TEST for split in splits], bool)),
        validation_N=mask_or_none(np.array([split == VALIDATION for split in splits], bool)),
        images=images.pixels,
        notes=(_describe(layout, columns, splits), *images.notes),
    )


def read_labelled_images(
    path: Path, files: Sequence[Path], labels: Contents, settings: ImageSettings, *, client_column: str | None = None
) -> Contents:
    """Read images whose classes are in a table with a column of file names.

    Args:
        path: the folder.
        files: images below it.
        labels: the table, with client and split of each row if files name them.
        settings: settings of the reading.
        client_column: column that names the client of each row.

    Raises:
        DataError: no column names the images, or a named image does not exist.
    """
    known = _files_by_name(path, files)
    column = settings.file_column or _file_column(labels.table, known, path)
    cells_N = to_categories(labels.table.column(column, "scenario.image"))
    found = [None if cell is None else known.get(_file_key(cell)) for cell in cells_N]
    unknown_N = np.array([file is None for file in found], bool)
    labels.table.refuse(unknown_N, column, "not the name of one image of this folder", "correcting the cell")
    chosen = [file for file in found if file is not None]
    images = _read(path, chosen, settings)
    rows = np.array(images.kept, np.int64)
    table = take_rows(Table({n: c for n, c in labels.table.columns.items() if n != column}, ()), rows)
    origins = tuple((name, 1, 1) for name in images.names)
    num_unused = len(set(files) - set(chosen))
    unused = (f"{num_unused} images without a row in the table are left out",) if num_unused else ()
    clients = clients_of_rows(labels.table, client_column) if client_column else labels.clients
    contents = Contents(
        table=Table(table.columns, origins),
        clients=None if clients is None else clients[rows],
        test_N=None if labels.test_N is None else labels.test_N[rows],
        validation_N=None if labels.validation_N is None else labels.validation_N[rows],
        images=images.pixels,
        notes=(f"images from column {column}", *unused, *images.notes),
    )
    parts = [Path(name).parts[:-1] for name in images.names]
    return _with_folders(contents, parts, settings, str(path))


def _with_folders(contents: Contents, parts: Sequence[tuple[str, ...]], settings: ImageSettings, path: str) -> Contents:
    """Add the split, the client and the group of images in folders, if neither table nor file says it."""
    layout = label_layout(parts, clients=settings.clients, layout=settings.layout)
    if layout is None:
        return contents
    splits = split_levels(layout, parts, path) if SPLIT in layout else []
    clients = [layout.names(folders, CLIENT) for folders in parts] if CLIENT in layout else None
    groups = [layout.names(folders, GROUP) for folders in parts] if GROUP in layout else None
    is_test, is_validation = (np.array([split == name for split in splits], bool) for name in (TEST, VALIDATION))
    return replace(
        contents,
        clients=_objects(clients) if contents.clients is None else contents.clients,
        groups=_objects(groups),
        test_N=mask_or_none(is_test) if contents.test_N is None else contents.test_N,
        validation_N=mask_or_none(is_validation) if contents.validation_N is None else contents.validation_N,
        notes=(f"folders {layout}", *contents.notes),
    )


def refuse_unreadable(path: Path, files: Sequence[Path], *, skip: bool) -> None:
    """Refuse image files in formats that fedlearn does not read, such as NIfTI.

    Raises:
        DataError: there is such a file; the message names the files.
    """
    wrong = [file for file in files if unreadable_kind(file)]
    if not wrong or skip:
        return
    kind = unreadable_kind(wrong[0]) or ""
    shown = ", ".join(str(file.relative_to(path)) for file in wrong[:MAX_NAMED])
    rest = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
    raise DataError(
        f"fedlearn does not read {kind} files: {shown}{rest}\n  expected  PNG, JPEG, TIFF, DICOM or another image\n"
        f"  advice    {UNREADABLE_SUFFIXES[kind]}, or scenario.skip_damaged=true to leave these files out"
    )


def _read(path: Path, files: Sequence[Path], settings: ImageSettings) -> ImageArrays:
    return read_images(
        files,
        [str(file.relative_to(path)) for file in files],
        size=settings.size,
        channels=settings.channels,
        skip_damaged=settings.skip_damaged,
    )


def _objects(names: Sequence[str] | None) -> np.ndarray | None:
    return None if names is None else np.array(names, object)


def _refuse_case_variants(names: Sequence[str], known: Sequence[str], level: str) -> None:
    """Refuse names that differ in upper case only, unless the user has named all of them."""
    by_key: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        by_key.setdefault(name.strip().casefold(), []).append(name)
    for variants in by_key.values():
        if len(variants) > 1 and not set(variants) <= set(known):
            setting = f"'scenario.{'classes' if level == CLASS else 'clients'}=[{','.join(dict.fromkeys(names))}]'"
            raise DataError(
                f"the folders {' and '.join(variants)} differ in upper case only\n"
                f"  expected  one spelling of a {level}\n  advice    {setting}, to keep both"
            )


def _describe(layout: FolderLayout, columns: Mapping[str, Sequence[str]], splits: Sequence[str]) -> str:
    """Return the layout, with the counts of the splits, for the header."""
    counts = Counter(splits)
    found = [f"{counts[split]} {split}" for split in SPLITS if counts[split]]
    missing = _missing_classes(columns)
    parts = [f"folders {layout}", *([f"({', '.join(found)} images)"] if found else []), *missing]
    return " ".join(parts)


def _missing_classes(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a statement about the clients and splits that lack a class."""
    classes, lacking = set(columns[CLASS]), []
    for level in (CLIENT, SPLIT):
        present: dict[str, set[str]] = {}
        for name, label in zip(columns.get(level, []), columns[CLASS], strict=False):
            present.setdefault(name, set()).add(label)
        lacking += [
            f"{name} has no {', '.join(sorted(classes - has))}" for name, has in present.items() if classes - has
        ]
    rest = f", and {len(lacking) - MAX_NAMED} more" if len(lacking) > MAX_NAMED else ""
    return [f"({', '.join(lacking[:MAX_NAMED])}{rest})"] if lacking else []


def _files_by_name(path: Path, files: Sequence[Path]) -> dict[str, Path]:
    """Return each image by its path, its name and its stem. Names of several images are absent."""
    keys: dict[str, Path | None] = {}
    for file in files:
        relative = file.relative_to(path)
        for key in {str(relative), str(relative.with_suffix("")), file.name, file.stem}:
            folded = _file_key(key)
            keys[folded] = None if keys.get(folded, file) != file else file
    return {key: file for key, file in keys.items() if file is not None}


def _file_key(cell: str) -> str:
    return cell.strip().replace("\\", "/").removeprefix("./").casefold()


def _file_column(table: Table, known: Mapping[str, Path], path: Path) -> str:
    """Return the column with the most names of images.

    Raises:
        DataError: no column has the names of images, or several have.
    """
    counts = {}
    for name, cells_N in table.columns.items():
        counts[name] = sum(cell is not None and _file_key(cell) in known for cell in to_categories(cells_N))
    best = max(counts, key=counts.__getitem__, default="")
    tied = [name for name, count in counts.items() if count == counts[best]]
    if not counts or not counts[best] or len(tied) > 1:
        problem = "no column with the names of the images" if len(tied) != 2 or not counts[best] else " and ".join(tied)
        raise DataError(
            f"{path} has both tables and images, but the tables have {problem}\n"
            f"  expected  one column with names of files\n  try       scenario.image={tied[0] if best else 'COLUMN'}"
        )
    return best
