"""Check images: sizes, channels, bit depths, classes by site, duplicates, and damaged files.

Shapes: N images.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedlearn.advice import assignment
from fedlearn.data.contents import CLASS_COLUMN, Contents
from fedlearn.data.data_check.check import check_data
from fedlearn.data.data_check.coded_table import sample_rows
from fedlearn.data.data_check.records import DataCheck, Flag
from fedlearn.data.data_check.settings import CheckSettings
from fedlearn.data.data_check.typed_columns import TypedColumns
from fedlearn.data.data_check.unit_flags import join_names
from fedlearn.data.folder import read_contents
from fedlearn.data.folder_layout import list_files
from fedlearn.data.image_folders import ImageSettings
from fedlearn.data.images import ImageHeader, is_image, read_headers
from fedlearn.data.tables import Table, take_rows

MAX_IMAGES = 2_000  # images of a sample
MAX_BYTES = 10**8  # pixels of a sample
SIZE_COMPARED = 64  # side of the scaled images that are compared, pixels
PROPERTIES = ("image size", "image channels", "image depth")


def inspect_images(path: Path, settings: CheckSettings, images: ImageSettings) -> DataCheck:
    """Return the data check of a folder of images. All images are read; damaged files and sizes are flags.

    Raises:
        DataError: the layout is not clear, or no image can be read.
        MissingExtra: Pillow is not installed.
    """
    files = [file for file in list_files(path) if is_image(file)]
    names = [str(file.relative_to(path)) for file in files]
    headers, problems = read_headers(files)
    lenient = replace(images, size=images.size or SIZE_COMPARED, skip_damaged=True)
    contents = read_contents(path, client_column=settings.client, images=lenient)
    header_of = {names[place]: header for place, header in headers.items()}
    kept = [name for name, _, _ in contents.table.origins]
    damaged = {names[place]: reason for place, reason in problems.items()}
    damaged |= dict.fromkeys(header_of.keys() - {*kept}, "damaged or cut short") if not _has_labels(path) else {}
    properties = _properties([header_of[name] for name in kept])
    flags = [*_flag_damaged(damaged, len(files)), *_flag_properties([header_of[name] for name in kept], images)]
    return check_images(contents, settings, source=path.name, properties=properties, flags=flags)


def check_images(
    contents: Contents,
    settings: CheckSettings,
    *,
    source: str,
    properties: Mapping[str, np.ndarray] | None = None,
    flags: Sequence[Flag] = (),
) -> DataCheck:
    """Return the data check of images that were read.

    Args:
        contents: images with their classes, clients and splits.
        settings: roles of the columns; without a target, the class is the target.
        source: name of the folder.
        properties: further columns, e.g. the size of each file.
        flags: flags from the reading of the files.
    """
    assert contents.images is not None
    if not settings.targets and CLASS_COLUMN in contents.table.columns:
        settings = replace(settings, targets=(CLASS_COLUMN,))
    table = Table({**contents.table.columns, **(properties or {})}, contents.table.origins)
    clients_N, test_N, num_rows, images = contents.clients, contents.test_N, len(table), contents.images
    if settings.is_sampled:
        rows_N = _sample(images, clients_N)
        origins = tuple(table.origins[row] for row in rows_N)
        table, images = replace(take_rows(table, rows_N), origins=origins), images[rows_N]
        clients_N, test_N = (part if part is None else part[rows_N] for part in (clients_N, test_N))
    check = check_data(
        TypedColumns(table=table),
        replace(settings, is_sampled=False, properties=PROPERTIES),
        source=source,
        clients_N=clients_N,
        test_N=test_N,
        flags=flags,
        digests_N=np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images], object),
    )
    return replace(check, unit="images", num_rows=num_rows)


def _sample(images_N: np.ndarray, clients_N: np.ndarray | None) -> np.ndarray:
    """Return the places of the images of a sample of bounded size."""
    bytes_of_image = max(1, images_N.nbytes // max(1, len(images_N)))
    max_rows = max(1, min(MAX_IMAGES, MAX_BYTES // bytes_of_image))
    names, site_N = np.unique(clients_N.astype(str), return_inverse=True) if clients_N is not None else ((), None)
    site_N = np.zeros(len(images_N), np.int64) if site_N is None else site_N
    return sample_rows(site_N, max(1, len(names)), max_rows)


def _has_labels(path: Path) -> bool:
    """Return whether a table may leave out images, so that an absent image is not damaged."""
    return any(not is_image(file) for file in list_files(path))


def _properties(headers: Sequence[ImageHeader]) -> dict[str, np.ndarray]:
    cells = [
        (f"{header.width} x {header.height}", "grey" if header.is_grey else "colour", _depth(header))
        for header in headers
    ]
    return {name: np.array([cell[place] for cell in cells], object) for place, name in enumerate(PROPERTIES)}


def _depth(header: ImageHeader) -> str:
    return f"{header.depth} bits" if header.depth else "any range"


def _flag_damaged(damaged: Mapping[str, str], num_files: int) -> Iterator[Flag]:
    if damaged:
        shown = join_names([f"{name} ({reason})" for name, reason in sorted(damaged.items())], at_most=10)
        text = f"{len(damaged):,} of {num_files:,} images cannot be read: {shown}"
        advice = assignment("scenario.skip_damaged", True)
        yield Flag(kind="unreadable", message=text, advice=advice, rows=tuple(sorted(damaged)))


def _flag_properties(headers: Sequence[ImageHeader], images: ImageSettings) -> Iterator[Flag]:
    sizes = Counter(f"{header.width} x {header.height}" for header in headers)
    if len(sizes) > 1 and images.size is None:
        smallest = min(min(header.width, header.height) for header in headers)
        text = f"{len(sizes)} sizes: {_counts(sizes)}; training needs equal sizes"
        yield Flag(kind="image sizes", column=PROPERTIES[0], message=text, advice=f"scenario.image_size={smallest}")
    colours = Counter("grey" if header.is_grey else "colour" for header in headers)
    if len(colours) > 1 and images.channels is None:
        text = f"{_counts(colours)}; training turns grey images into colour"
        yield Flag(kind="image channels", column=PROPERTIES[1], message=text, advice="scenario.image_channels=1")
    depths = Counter(map(_depth, headers))
    if len(depths) > 1:
        text = f"{_counts(depths)}; training scales all images to one depth"
        yield Flag(kind="image depth", column=PROPERTIES[2], message=text, advice="scenario.image_channels=1")


def _counts(counter: Counter[str]) -> str:
    return join_names([f"{name} {count:,}" for name, count in counter.most_common()])
