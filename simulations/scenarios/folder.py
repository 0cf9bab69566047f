"""The scenario `folder`: tables or images of the user.

Shapes: N rows or images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.core.federated_data import Task
from fedlearn.data.encoding import encode_targets
from fedlearn.data.federated_statistics import Noise
from fedlearn.data.folder import CLASS_COLUMN, Contents, read_contents, read_images_for_shape
from fedlearn.data.from_arrays import from_rows, split_rows
from fedlearn.data.hugging_face import HUB_PREFIX, read_hub
from fedlearn.data.partition import Natural, Partition, Time, as_partition, partition_rows
from fedlearn.data.preprocessing import PreprocessingResult, PreprocessingSettings, fit_preprocessing
from fedlearn.data.tables import (
    Table,
    drop_columns,
    read_table,
    reorder_columns,
    to_categories,
    to_category,
    to_numbers,
)
from fedlearn.errors import DataError, SettingError, require
from fedlearn.loop.scenario import Scenario
from simulations.models import build_trainer

NUM_TEXT_FEATURES = 4096  # hashed words of a text; hashing needs no vocabulary of clients


def folder(
    *,
    framework: str = "torch",
    model: Any = "mlp",
    partition: Partition | str = "natural",
    path: str | PathLike[str] | None = None,
    target: str | None = None,
    task: Task | None = None,
    classes: Sequence[Any] | None = None,
    client: str | None = None,
    clients: Sequence[Any] | None = None,
    ignore: Sequence[str] | None = None,
    text: str | None = None,
    scale: str = "federated",
    scales: Mapping[str, Sequence[float]] | None = None,
    categories: Mapping[str, Sequence[Any]] | None = None,
    bounds: Mapping[str, Sequence[float]] | None = None,
    noise_multiplier: float | None = None,
    image_size: int | None = None,
    order_by: str | None = None,
    seed: int = 1,
    device: str = "cpu",
    deployed: bool = False,
) -> Scenario:
    """Learn from your own tables (CSV, TSV, Parquet) or images; `fedlearn.data.folder` describes the layout.

    Or a data set of the Hugging Face Hub: ``path=hf://owner/name``, see `fedlearn.data.hugging_face`.

    A missing value is put at the centre of its column. With ``scale=federated`` clients add up counts, sums and sums of
    squares of their training rows, and the header says so (`fedlearn.data.federated_statistics` tells what that
    reveals); nothing else is learned from pooled data but which classes there are. A real node has its own rows only
    and takes no part in such a round: there ``scale=constants``, ``classes`` and ``clients`` must be said.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``mlp`` (32 hidden units), ``linear``, ``cnn`` (images), or a module.
        partition: the clients in the data if ``natural``; defaults: 10 clients, 2 classes per client, test share 0.25,
            unless files are called train and test.
        path: a file, a folder, or ``hf://owner/name``.
        target: the column to predict; of images it is their folder's name.
        task: ``binary``, ``multiclass`` or ``regression``; None goes by the target column.
        classes: all values of the target in the order of their numbers; None takes those that are there.
        client: the column that says whose row it is; None goes by names of files and folders.
        clients: the names of all clients in the order of their numbers; None takes those that are there, sorted. With
            these a folder may hold the rows of some of them only, as at a real node: the others have none.
        ignore: columns to leave out, e.g. numbers of patients.
        text: the column to learn from, word by word (hashed to 4,096 features), instead of all others.
        scale: ``federated``; ``constants``: less the centre, over the spread of ``scales``; or ``none``.
        scales: column -> (centre, spread), for ``constants``; of a regression's target too.
        categories: column -> its values, each of which becomes a feature. For ``federated`` those of columns of text
            are counted in the round where they are not said.
        bounds: column -> (least, most) that a value can be, for ``noise_multiplier``.
        noise_multiplier: Gaussian noise on each client's statistics over what a row changes them by, > 0; it pays
            for it in the ledger of ``privacy=example``. Bounds or categories of every column must be said. None: exact.
        image_size: to which images are scaled, pixels; None takes them as they are.
        order_by: the column by which ``time`` and ``feature`` divide.
        seed: of partition and split.
        device: where to compute.
        deployed: whether this is a real node, which says so itself.

    Raises:
        SettingError: a setting is out of range, or must be said.
        DataError: the data cannot be read; names file, row and column.
        MissingExtra: Parquet or images need an optional dependency.
    """
    partition = as_partition(partition)
    _require_said(path, clients, partition, deployed=deployed)
    noise = _noise(noise_multiplier, bounds, categories, seed)
    preparation = PreprocessingSettings(scale=scale, scales=scales or {}, categories=categories or {}, noise=noise)
    contents = _read(str(path), client_column=client, ignored_columns=ignore or (), image_size=image_size)
    names, natural_N = _owners(contents, clients)
    whole = not deployed and len(np.unique(natural_N)) == len(names)
    label = _label(contents, target)
    y_N, kind, known = encode_targets(contents.table, label, task=task, classes=classes, has_all_clients=whole)
    rows = _rows(partition, contents, y_N, natural_N, names=names, order_by=order_by, seed=seed)
    train, test = _sides(contents, rows, y_N, test_share=partition.held_out_share, seed=seed)
    left_out = (label, client, order_by if isinstance(partition, Time) else None)
    columns = drop_columns(contents.table, [name for name in left_out if name])
    scaled = {} if contents.images is not None or text is not None else dict(columns.columns)
    if kind == "regression" and (scale == "federated" or label in preparation.scales):
        scaled[label] = contents.table.columns[label]
    made = (
        fit_preprocessing(Table(scaled, contents.table.origins), train, preparation, has_all_clients=whole)
        if scaled
        else PreprocessingResult()
    )
    x, said = _features(contents, columns, text, made)
    if label in made.encoding.scales:
        centre, spread = made.encoding.scales[label]
        y_N, said = (y_N - centre) / spread, f"{said}, the target less {centre:.6g}, over {spread:.6g}"
    data = replace(
        from_rows(x, y_N, train=train, test=test, task=kind),
        num_classes=len(known) or 1,
        names=dict(enumerate(names)) if isinstance(partition, Natural) else {},
        source=" · ".join(part for part in (Path(str(path)).name, said) if part),
    )
    fitted, line = build_trainer(model, data, input_shape=x.shape[1:], hidden=(32,), framework=framework, device=device)

    def read(file: Path) -> np.ndarray:
        if contents.images is not None:
            return read_images_for_shape(x.shape[1:], file).astype(np.float32) / 255
        new = read_table(file)
        return _features(
            Contents(table=new, clients=None, test_N=None), reorder_columns(new, columns, file), text, made
        )[0]

    return Scenario(
        name="folder",
        data=data,
        trainer=fitted,
        model=line,
        partition=str(partition),
        disclosure=made.disclosure,
        ledger=made.ledger,
        read_inputs=read,
        target_scale=made.encoding.scales.get(label, (0.0, 1.0)),
    )


def _require_said(path: Any, clients: Sequence[Any] | None, partition: Partition, *, deployed: bool) -> None:
    require(path is not None, "path", path, "a CSV or Parquet file, or a folder", "path=my_data")
    alike = not deployed or (clients is not None and isinstance(partition, Natural))
    expected = "the names of all clients in the order of their numbers, at real nodes"
    require(alike, "clients", clients, expected, "'scenario.clients=[north,south]' partition=natural")


def _read(path: str, **how: Any) -> Contents:
    return read_hub(path, **how) if path.startswith(HUB_PREFIX) else read_contents(Path(path).expanduser(), **how)


def _owners(contents: Contents, clients: Sequence[Any] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of all clients in the order of their numbers, and the client number of each row."""
    if contents.clients is None:
        said = clients is None
        require(said, "clients", clients, "nothing: these data do not say whose row is whose", "client=COLUMN")
        return (), np.zeros(0, np.int64)
    here, natural_N = np.unique(contents.clients.astype(str), return_inverse=True)
    names = tuple(here.tolist()) if clients is None else tuple(to_category(name) for name in clients)
    if strangers := [name for name in here.tolist() if name not in names]:
        fix = f"'scenario.clients=[{','.join([*names, *strangers])}]'"
        raise SettingError("clients", list(names), f"all clients: {strangers[0]} is in the folder too", fix)
    number_of = np.array([names.index(name) for name in here.tolist()])
    return names, number_of[natural_N]


def _label(contents: Contents, target: str | None) -> str:
    if contents.images is not None:
        return CLASS_COLUMN
    if target is None:
        has = list(contents.table.columns)
        raise SettingError("target", target, f"the column to predict, one of {', '.join(has)}", f"target={has[-1]}")
    return target


def _rows(
    partition: Partition,
    contents: Contents,
    y_N: np.ndarray,
    natural_N: np.ndarray,
    *,
    names: Sequence[str],
    order_by: str | None,
    seed: int,
) -> list[np.ndarray]:
    """Return the rows of each client; a client whose data are at another node has none."""
    if isinstance(partition, Natural):
        expected = "iid, dirichlet, ...: these data have no natural clients"
        fix = "partition=iid   (or scenario.client=COLUMN, if a column names the clients)"
        require(bool(names), "partition", partition, expected, fix)
        partition.require_num_clients(len(names))
        return [np.flatnonzero(natural_N == number) for number in range(len(names))]
    order_N = None
    if order_by is not None:
        cells_N = contents.table.column(order_by, "scenario.order_by")
        missing_N = np.array([cell is None for cell in to_categories(cells_N)])
        contents.table.refuse(missing_N, order_by, "missing, but rows are ordered by it", "removing the row")
        values_N, wrong_N = to_numbers(cells_N)
        # text is ordered as text, which for dates as in 2026-01-31 is their order
        order_N = np.unique(cells_N.astype(str), return_inverse=True)[1] if wrong_N.any() else values_N
    return partition_rows(partition, y_N, natural_N if names else None, order_N=order_N, seed=seed)


def _sides(
    contents: Contents, rows: Sequence[np.ndarray], y_N: np.ndarray, *, test_share: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if contents.test_N is None:
        return split_rows(rows, y_N, test_share=test_share, seed=seed)
    held_out_N = contents.test_N
    return [rows_k[~held_out_N[rows_k]] for rows_k in rows], [rows_k[held_out_N[rows_k]] for rows_k in rows]


def _noise(
    multiplier: float | None,
    bounds: Mapping[str, Sequence[float]] | None,
    categories: Mapping[str, Sequence[Any]] | None,
    seed: int,
) -> Noise | None:
    if multiplier is None:
        return None
    pairs = {name: (pair[0], pair[1]) for name, pair in (bounds or {}).items()}
    known = {name: tuple(map(to_category, values)) for name, values in (categories or {}).items()}
    return Noise(multiplier=multiplier, bounds=pairs, categories=known, seed=seed)


def _features(
    contents: Contents, columns: Table, text: str | None, made: PreprocessingResult
) -> tuple[np.ndarray, str]:
    """Return the features, and a text about them for the header."""
    if contents.images is not None:
        return contents.images.astype(np.float32) / 255, ""
    if text is not None:
        return _word_features(columns, text), f"words of {text}, hashed"
    if not columns.columns:
        raise DataError("no column is left to learn from\n  try       fewer names in scenario.ignore")
    return made.encoding.features(columns), made.summary


def _word_features(columns: Table, text: str) -> np.ndarray:
    """Return counts of hashed words, of unit length; hashing needs no statistics of clients."""
    from sklearn.feature_extraction.text import HashingVectorizer

    cells_N = columns.column(text, "scenario.text")
    said = ["" if cell is None else str(cell) for cell in cells_N]
    hashed = HashingVectorizer(n_features=NUM_TEXT_FEATURES, dtype=np.float32).transform(said)
    return np.asarray(hashed.toarray())
