"""Data sets of the Hugging Face Hub, by way of flwr-datasets.

``hf://owner/name``, ``hf://owner/name/subset``, with ``@revision`` at the end to pin a version: without it the data are
whatever the Hub has that day. ``hf:///a/folder`` is one of this machine, in a layout that the ``datasets`` library
reads. Downloads are kept below our own cache, see `fedlearn.data.download`.

Shapes: N rows or images.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.data.download.catalog import cache_folder
from fedlearn.data.folder import CLASS_COLUMN, Contents, clients_of_rows, read_images
from fedlearn.data.tables import Table, concat_tables, from_arrow
from fedlearn.errors import DataError, MissingExtra

HUB_PREFIX = "hf://"
TRAIN, TEST = "train", "test"


def read_hub(
    path: str, *, client_column: str | None = None, ignored_columns: Sequence[str] = (), image_size: int | None = None
) -> Contents:
    """The train and, if there is one, test split of a data set.

    Args:
        path: ``hf://owner/name[/subset][@revision]``, or ``hf:///folder``.
        client_column: the column that says whose row it is.
        ignored_columns: columns to leave out.
        image_size: to which images are scaled, pixels; None takes them as they are.

    A column of class numbers becomes one of class names; a column of images becomes the images, and the column of class
    numbers beside it ``class``.

    Raises:
        DataError: it cannot be had, or a column holds what cannot be learned from.
        MissingExtra: flwr-datasets is absent.
    """
    splits = _load(path)
    tables = [_table(split, f"{path} ({name})", ignored_columns) for name, split in splits.items()]
    table = concat_tables(tables)
    held_out_N = np.repeat([name == TEST for name in splits], [len(split) for split in splits.values()])
    return Contents(
        table=table,
        clients=clients_of_rows(table, client_column) if client_column else None,
        test_N=held_out_N if held_out_N.any() else None,
        images=_images(list(splits.values()), table, image_size),
    )


def _load(path: str) -> dict[str, Any]:
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        from flwr_datasets import FederatedDataset
        from flwr_datasets.partitioner import IidPartitioner
    except ImportError as error:
        raise MissingExtra(f"scenario.path={path}", "data") from error
    name, subset, revision = parse_hub_path(path)
    seen: dict[str, Any] = {}
    try:
        FederatedDataset(
            dataset=name,
            subset=subset,
            preprocessor=lambda splits: seen.update(splits) or splits,  # to learn which splits there are
            partitioners={TRAIN: IidPartitioner(num_partitions=1)},
            shuffle=False,
            revision=revision,
            cache_dir=str(cache_folder() / "huggingface"),
        ).load_split(TRAIN)
    except Exception as error:  # of many kinds, by way of several libraries
        fix = "an internet connection and HF_HUB_OFFLINE=0, or a folder: scenario.path=hf:///my/folder"
        raise DataError(f"{path} cannot be had: {str(error).splitlines()[0]}\n  try       {fix}") from error
    return {name: seen[name] for name in (TRAIN, TEST) if name in seen}


def parse_hub_path(path: str) -> tuple[str, str | None, str | None]:
    """Name, subset and revision of a path.

    >>> parse_hub_path("hf://nyu-mll/glue/sst2@main"), parse_hub_path("hf:///my/folder")
    (('nyu-mll/glue', 'sst2', 'main'), ('/my/folder', None, None))
    """
    rest = path.removeprefix(HUB_PREFIX)
    if rest.startswith("/"):
        return rest, None, None
    name, _, revision = rest.partition("@")
    owner, *others = name.split("/")
    if not owner or len(others) > 2:
        raise DataError(f"scenario.path is {path}\n  expected  hf://owner/name, or hf://owner/name/subset")
    return "/".join([owner, *others[:1]]), others[1] if len(others) == 2 else None, revision or None


def _table(split: Any, name: str, ignore: Sequence[str]) -> Table:
    """The columns of a split but the images, class numbers by their names."""
    from datasets import ClassLabel, Image

    images = [column for column, kind in split.features.items() if isinstance(kind, Image)]
    table = from_arrow(split.with_format("arrow")[:], name, ignored_columns=[*images, *ignore])
    named = {column: kind for column, kind in split.features.items() if isinstance(kind, ClassLabel)}
    columns = {
        CLASS_COLUMN if images and column in named else column: _names(named[column], cells)
        if column in named
        else cells
        for column, cells in table.columns.items()
    }
    return Table(columns, table.origins)


def _names(kind: Any, numbers_N: np.ndarray) -> np.ndarray:
    """-1 stands for a class that is not told."""
    names = [kind.int2str(int(number)) if number >= 0 else None for number in numbers_N]
    return np.array(names, object)


def _images(splits: Sequence[Any], table: Table, size: int | None) -> np.ndarray | None:
    from datasets import Image

    columns = [column for column, kind in splits[0].features.items() if isinstance(kind, Image)]
    if not columns:
        return None
    cells = [cell for split in splits for cell in split.cast_column(columns[0], Image(decode=False))[columns[0]]]
    files = [io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"]) for cell in cells]
    return read_images(files, [table.row_location(row) for row in range(len(files))], size=size)
