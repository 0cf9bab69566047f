"""Read data sets of the Hugging Face Hub through flwr-datasets.

A path is ``hf://owner/name`` or ``hf://owner/name/subset``. ``@revision`` at the end pins a version. Without it, the
Hub may return other data on another day. ``hf:///a/folder`` is a local folder in a layout of the ``datasets`` library.
Downloads are kept in the cache folder of fedlearn, see `fedlearn.data.download`.

Shapes: N rows or images.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.tasks import Task
from fedlearn.data.arrow_tables import from_arrow
from fedlearn.data.contents import CLASS_COLUMN, Contents, clients_of_rows
from fedlearn.data.download.catalog import cache_folder
from fedlearn.data.from_arrays import Assignment, from_arrays, from_rows, rows_of_clients
from fedlearn.data.image_folders import ImageSettings
from fedlearn.data.images import ImageArrays, read_images
from fedlearn.data.tables import Table, concat_tables
from fedlearn.errors import DataError, MissingExtra, require

HUB_PREFIX = "hf://"
TRAIN, TEST = "train", "test"


def read_hub(
    path: str,
    *,
    client_column: str | None = None,
    ignored_columns: Sequence[str] = (),
    images: ImageSettings | None = None,
) -> Contents:
    """Read the train split of a data set, and the test split if it has one.

    A column of class numbers becomes a column of class names. A column of images becomes ``images``; the column of
    class numbers beside it gets the name ``class``.

    Args:
        path: ``hf://owner/name[/subset][@revision]``, or ``hf:///folder``.
        client_column: column that names the client of each row.
        ignored_columns: columns to leave out.
        images: settings of the reading of images; None takes the defaults.

    Raises:
        DataError: the data set cannot be read, or the type of a column is not supported.
        MissingExtra: flwr-datasets is not installed.
    """
    splits = _load(path)
    tables = [_table(split, f"{path} ({name})", ignored_columns) for name, split in splits.items()]
    table = concat_tables(tables)
    held_out_N = np.repeat([name == TEST for name in splits], [len(split) for split in splits.values()])
    pictures = _images(list(splits.values()), table, images or ImageSettings())
    return Contents(
        table=table,
        clients=clients_of_rows(table, client_column) if client_column else None,
        test_N=held_out_N if held_out_N.any() else None,
        images=None if pictures is None else pictures.pixels,
        notes=() if pictures is None else pictures.notes,
    )


def _load(path: str) -> dict[str, Any]:
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        from flwr_datasets import FederatedDataset
        from flwr_datasets.partitioner import IidPartitioner
    except ImportError as error:
        raise MissingExtra(f"scenario.path={path}", "data") from error
    name, subset, revision = parse_hub_path(path)
    available: dict[str, Any] = {}
    try:
        FederatedDataset(
            dataset=name,
            subset=subset,
            preprocessor=lambda splits: available.update(splits) or splits,  # records the available splits
            partitioners={TRAIN: IidPartitioner(num_partitions=1)},
            shuffle=False,
            revision=revision,
            cache_dir=str(cache_folder() / "huggingface"),
        ).load_split(TRAIN)
    except Exception as error:  # several libraries raise many kinds
        fix = "an internet connection and HF_HUB_OFFLINE=0, or a folder: scenario.path=hf:///my/folder"
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}\n  advice    {fix}") from error
    return {name: available[name] for name in (TRAIN, TEST) if name in available}


def from_datasets(
    dataset: Any,
    *,
    target: str,
    client_column: str | None = None,
    assignment: Assignment | None = None,
    features: Sequence[str] | None = None,
    task: Task | str = "multiclass",
    test_share: float = 0.25,
    seed: int = 1,
) -> FederatedData:
    """Build federated data from a data set of the Hugging Face library ``datasets``.

    Args:
        dataset: a ``datasets.Dataset``, a ``datasets.DatasetDict`` with the split ``train`` and perhaps ``test``, or a
            path of the Hub, see the head of this module.
        target: name of the column of targets.
        client_column: name of the column that names the client of each row. Give this or ``assignment``.
        assignment: client of each row, or rows of each client, as in `fedlearn.from_arrays`. Row numbers count the rows
            of ``train`` first, then the rows of ``test``.
        features: names of the columns of inputs: one column of images, or columns of numbers. Default: all others.
        task: ``binary``, ``multiclass``, ``regression``, or a `Task`.
        test_share: share that each client holds out, in [0, 1); not used if there is a split ``test``.
        seed: seed of the split.

    Raises:
        DataError: a column is missing, or has neither numbers nor images.
        MissingExtra: flwr-datasets is not installed, and ``dataset`` is a path.
        SettingError: not exactly one of ``client_column`` and ``assignment`` is given.
    """
    expected = "exactly one of client_column and assignment"
    require(
        (client_column is None) != (assignment is None), "client_column", client_column, expected, "assignment=null"
    )
    splits = _splits(dataset)
    columns = list(splits[TRAIN].column_names)
    names = [name for name in columns if name not in (target, client_column)] if features is None else list(features)
    for name in (target, *names, *([client_column] if client_column else [])):
        if name not in columns:
            raise DataError(f"the data set has no column {name}\n  expected  one of {', '.join(columns)}")
    x = _inputs(splits, names)
    y = _column(splits, target)
    if client_column:
        clients, client_N = np.unique(_column(splits, client_column), return_inverse=True)
        assignment = client_N.reshape(-1)
    assert assignment is not None
    data = _divide(splits, x, y, assignment, task=task, test_share=test_share, seed=seed)
    return replace(data, names=dict(enumerate(map(str, clients)))) if client_column else data


def _splits(dataset: Any) -> dict[str, Any]:
    if isinstance(dataset, str):
        return _load(dataset)
    return (
        {name: dataset[name] for name in (TRAIN, TEST) if name in dataset}
        if hasattr(dataset, "keys")
        else {TRAIN: dataset}
    )


def _column(splits: Mapping[str, Any], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(split.with_format(None)[name][:]) for split in splits.values()])


def _inputs(splits: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """Return images (N, height, width, channels), or columns of numbers side by side (N, columns)."""
    if len(names) == 1 and type(splits[TRAIN].features[names[0]]).__name__ == "Image":
        origins = [f"{name}, row {row + 1}" for name, split in splits.items() for row in range(len(split))]
        return read_images(_image_files(list(splits.values()), names[0]), origins).pixels
    columns = {name: _column(splits, name) for name in names}
    for name, cells in columns.items():
        if not np.issubdtype(cells.dtype, np.number):
            fix = f"features=[...] without {name}"
            raise DataError(
                f"column {name} holds no numbers\n  expected  numbers, or one column of images\n  advice    {fix}"
            )
    return np.concatenate([cells.reshape(len(cells), -1) for cells in columns.values()], axis=1)


def _divide(
    splits: Mapping[str, Any],
    x: np.ndarray,
    y: np.ndarray,
    assignment: Assignment,
    *,
    task: Task | str,
    test_share: float,
    seed: int,
) -> FederatedData:
    if TEST not in splits:
        return from_arrays(x, y, assignment=assignment, task=task, test_share=test_share, seed=seed)
    rows_K, num_train = rows_of_clients(assignment, num_examples=len(y)), len(splits[TRAIN])
    train_K, test_K = ([rows[belongs(rows, num_train)] for rows in rows_K] for belongs in (np.less, np.greater_equal))
    return from_rows(x, y, train=train_K, test=test_K, task=task)


def parse_hub_path(path: str) -> tuple[str, str | None, str | None]:
    """Parse a path into name, subset and revision.

    >>> parse_hub_path("hf://nyu-mll/glue/sst2@main"), parse_hub_path("hf:///my/folder")
    (('nyu-mll/glue', 'sst2', 'main'), ('/my/folder', None, None))
    """
    rest = path.removeprefix(HUB_PREFIX)
    if rest.startswith("/"):
        return rest, None, None
    name, _, revision = rest.partition("@")
    owner, *others = name.split("/")
    if not owner or len(others) > 2:
        expected = "hf://owner/name, or hf://owner/name/subset"
        raise DataError(f"scenario.path is {path}\n  expected  {expected}\n  try       scenario.path=hf://ylecun/mnist")
    return "/".join([owner, *others[:1]]), others[1] if len(others) == 2 else None, revision or None


def _table(split: Any, name: str, ignored_columns: Sequence[str]) -> Table:
    """Return the columns of a split without images, with class names instead of class numbers."""
    from datasets import ClassLabel, Image

    images = [column for column, kind in split.features.items() if isinstance(kind, Image)]
    table = from_arrow(split.with_format("arrow")[:], name, ignored_columns=[*images, *ignored_columns])
    class_labels = {column: kind for column, kind in split.features.items() if isinstance(kind, ClassLabel)}
    columns = {
        CLASS_COLUMN if images and column in class_labels else column: _class_names(class_labels[column], cells)
        if column in class_labels
        else cells
        for column, cells in table.columns.items()
    }
    return Table(columns, table.origins)


def _class_names(kind: Any, numbers_N: np.ndarray) -> np.ndarray:
    """Return the name of each class number; -1 stands for an unknown class, which becomes None."""
    names = [kind.int2str(int(number)) if number >= 0 else None for number in numbers_N]
    return np.array(names, object)


def _images(splits: Sequence[Any], table: Table, settings: ImageSettings) -> ImageArrays | None:
    from datasets import Image

    columns = [column for column, kind in splits[0].features.items() if isinstance(kind, Image)]
    if not columns:
        return None
    files = _image_files(splits, columns[0])
    names = [table.row_location(row) for row in range(len(files))]
    return read_images(files, names, size=settings.size, channels=settings.channels)


def _image_files(splits: Sequence[Any], column: str) -> list[io.BytesIO | Path]:
    from datasets import Image

    cells = [cell for split in splits for cell in split.cast_column(column, Image(decode=False))[column]]
    return [io.BytesIO(cell["bytes"]) if cell["bytes"] else Path(cell["path"]) for cell in cells]
