"""Data of one's own, from a folder.

Shapes: N rows or images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.data.arrays import from_rows, split_rows
from fedlearn.data.encode import Encoding, as_it_is, declared, found, targets
from fedlearn.data.federated import Task
from fedlearn.data.folder import CLASS, Contents, read_contents
from fedlearn.data.partition import Partition, partition_rows
from fedlearn.data.statistics import add, column_sums
from fedlearn.data.tables import Table, numbers, only, rows_of, without, word, words
from fedlearn.errors import DataError, SettingError, did_you_mean, require
from fedlearn.scenario import Scenario
from simulations.models import trainer

SCALES = ("federated", "constants", "none")
WORD_FEATURES = 1024  # of a text: words are hashed to so many, so that no vocabulary has to be learned from anybody


def folder(
    *,
    framework: str = "torch",
    model: Any = "mlp",
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
    image_size: int | None = None,
    partition: str = "natural",
    num_clients: int | None = None,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    order_by: str | None = None,
    strictness: float = 0.8,
    test_share: float = 0.25,
    seed: int = 1,
    device: str = "cpu",
) -> Scenario:
    """Your own tables (CSV, TSV, Parquet) or images: see `fedlearn.data.folder` for how a folder may look.

    A missing value is put at the centre of its column. With ``scale=federated`` clients add up counts, sums and sums of
    squares of their training rows, and the header says so (`fedlearn.data.statistics` tells what that reveals); nothing
    else is learned from pooled data but which classes there are. A real node has its own rows only and takes no part in
    such a round: there ``scale=constants``, ``classes`` and ``clients`` must be said.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``mlp`` (32 hidden units), ``linear``, ``cnn`` (images), or a module of your own.
        path: a file or a folder.
        target: the column to predict; of images it is their folder's name.
        task: ``binary``, ``multiclass`` or ``regression``; None goes by the target column.
        classes: all values of the target in the order of their numbers; None takes those that are there.
        client: the column that says whose row it is; None goes by names of files and folders.
        clients: the names of all clients in the order of their numbers; None takes those that are there, sorted. With
            these a folder may hold the rows of some of them only, as at a real node: the others have none.
        ignore: columns to leave out, e.g. numbers of patients.
        text: the column to learn from, word by word (hashed to 1,024 features), instead of all others.
        scale: ``federated``; ``constants``: less the centre, over the spread of ``scales``; or ``none``.
        scales: column -> (centre, spread), for ``constants``; of a regression's target too.
        categories: column -> its values, each of which becomes a feature. For ``federated`` those of columns of text
            are counted in the round where they are not said.
        image_size: to which images are scaled, pixels; None takes them as they are.
        partition: ``natural`` (by client), or a way to divide rows whoever had them, see `fedlearn.data.partition`.
        num_clients: of other partitions, 10 unless said.
        alpha: of ``dirichlet`` and ``quantity``, > 0.
        classes_per_client: of ``pathological`` and ``shards``.
        order_by: the column by which ``time`` and ``feature`` divide.
        strictness: of ``feature``, in [0, 1].
        test_share: held out at each client, in [0, 1), unless files are called train and test.
        seed: of partition and split.
        device: where to compute.

    Raises:
        SettingError: a setting is out of range, or must be said.
        DataError: the data cannot be read; names file, row and column.
        MissingExtra: Parquet or images need an optional dependency.
    """
    require(path is not None, "path", path, "a CSV or Parquet file, or a folder", "path=my_data")
    near = did_you_mean(str(scale), SCALES) or "federated"
    require(scale in SCALES, "scale", scale, f"one of {', '.join(SCALES)}", f"scale={near}")
    contents = read_contents(Path(str(path)).expanduser(), client=client, image_size=image_size)
    names, natural_N = _owners(contents, clients)
    whole = len(np.unique(natural_N)) == len(names)
    label = _label(contents, target)
    y_N, kind, known = targets(contents.table, label, task=task, classes=classes, whole=whole)
    how = Partition(
        kind=partition,
        num_clients=num_clients or (len(names) or 1 if partition == "natural" else 10),
        alpha=alpha,
        classes_per_client=classes_per_client,
        seed=seed,
        strictness=strictness,
    )
    rows = _rows(how, contents, y_N, natural_N, names=names, order_by=order_by)
    train, test = _sides(contents, rows, y_N, test_share=test_share, seed=seed)
    left_out = {label, *(ignore or ()), client, order_by if partition == "time" else None}
    columns = without(contents.table, [name for name in left_out if name])
    if contents.images is not None:
        x, said = contents.images.astype(np.float32) / 255, ""
    elif text is not None:
        x, said = _word_features(columns, text), f"words of {text}, hashed"
    else:
        encoding, said = _encoding(columns, train, scale, scales or {}, categories or {}, whole=whole)
        x = encoding.features(columns)
    if kind == "regression":
        y_N, unit = _in_units(contents.table, label, y_N, train, scale, scales or {})
        said = ", ".join(part for part in (said, unit) if part)
    data = from_rows(x, y_N, train=train, test=test, task=kind)
    data = replace(
        data,
        num_classes=len(known) or 1,
        names=dict(enumerate(names)) if partition == "natural" else {},
        source=" · ".join(part for part in (Path(str(path)).name, said) if part),
    )
    fitted, line = trainer(model, data, input_shape=x.shape[1:], hidden=(32,), framework=framework, device=device)
    return Scenario(name="folder", data=data, trainer=fitted, model=line, partition=str(how))


def _owners(contents: Contents, clients: Sequence[Any] | None) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of all clients in the order of their numbers, and the number of whose each row is."""
    if contents.clients is None:
        said = clients is None
        require(said, "clients", clients, "nothing: these data do not say whose row is whose", "client=COLUMN")
        return (), np.zeros(0, np.int64)
    here, natural_N = np.unique(contents.clients.astype(str), return_inverse=True)
    names = tuple(here.tolist()) if clients is None else tuple(word(name) for name in clients)
    if strangers := [name for name in here.tolist() if name not in names]:
        fix = f"'scenario.clients=[{','.join([*names, *strangers])}]'"
        raise SettingError("clients", list(names), f"all clients: {strangers[0]} is in the folder too", fix)
    number_of = np.array([names.index(name) for name in here.tolist()])
    return names, number_of[natural_N]


def _label(contents: Contents, target: str | None) -> str:
    if contents.images is not None:
        return CLASS
    if target is None:
        has = list(contents.table.columns)
        raise SettingError("target", target, f"the column to predict, one of {', '.join(has)}", f"target={has[-1]}")
    return target


def _rows(
    how: Partition,
    contents: Contents,
    y_N: np.ndarray,
    natural_N: np.ndarray,
    *,
    names: Sequence[str],
    order_by: str | None,
) -> list[np.ndarray]:
    """The rows of each client; those of a client that is not here are none."""
    if how.kind == "natural" and names:
        fits = how.num_clients == len(names)
        require(
            fits, "num_clients", how.num_clients, f"{len(names)}, as many as there are", f"num_clients={len(names)}"
        )
        return [np.flatnonzero(natural_N == number) for number in range(len(names))]
    order_N = None
    if order_by is not None:
        cells_N = contents.table.column(order_by, "scenario.order_by")
        missing_N = np.array([cell is None for cell in words(cells_N)])
        contents.table.refuse(missing_N, order_by, "missing, but rows are ordered by it", "removing the row")
        values_N, wrong_N = numbers(cells_N)
        # text is ordered as text, which for dates as in 2026-01-31 is their order
        order_N = np.unique(cells_N.astype(str), return_inverse=True)[1] if wrong_N.any() else values_N
    return partition_rows(how, y_N, order_N=order_N)


def _sides(
    contents: Contents, rows: Sequence[np.ndarray], y_N: np.ndarray, *, test_share: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if contents.test_N is None:
        return split_rows(rows, y_N, test_share=test_share, seed=seed)
    held_out_N = contents.test_N
    return [rows_k[~held_out_N[rows_k]] for rows_k in rows], [rows_k[held_out_N[rows_k]] for rows_k in rows]


def _encoding(
    columns: Table,
    train: Sequence[np.ndarray],
    scale: str,
    scales: Mapping[str, Sequence[float]],
    categories: Mapping[str, Sequence[Any]],
    *,
    whole: bool,
) -> tuple[Encoding, str]:
    """How columns become features, and what to say of it in the header."""
    if not columns.columns:
        raise DataError("no column is left to learn from\n  try       fewer names in scenario.ignore")
    if scale == "constants":
        return declared(columns, scales, categories), "scaled by constants"
    if scale == "none":
        return as_it_is(columns, categories), ""
    expected = "constants, where a folder does not hold all clients: a statistics round needs the rows of all"
    require(whole, "scale", scale, expected, "scale=constants")
    statistics = add(column_sums(rows_of(columns, rows_k)) for rows_k in train)
    return found(columns, statistics, categories), f"scaled by exact statistics of {len(train)} clients"


def _in_units(
    table: Table,
    label: str,
    y_N: np.ndarray,
    train: Sequence[np.ndarray],
    scale: str,
    scales: Mapping[str, Sequence[float]],
) -> tuple[np.ndarray, str]:
    """A regression's target less its centre, over its spread, and what to say of it."""
    if scale == "none" or (scale == "constants" and label not in scales):
        return y_N, ""
    if scale == "constants":
        centre, spread = declared(only(table, label), scales, {}).scales[label]
    else:
        sums = add(column_sums(rows_of(only(table, label), rows_k)) for rows_k in train)[label]
        centre, spread = sums.mean, sums.deviation
    return (y_N - centre) / spread, f"target less {centre:.6g}, over {spread:.6g}"


def _word_features(columns: Table, text: str) -> np.ndarray:
    """Counts of hashed words and pairs of words, of unit length: nothing is learned, so nothing is told."""
    from sklearn.feature_extraction.text import HashingVectorizer

    cells_N = columns.column(text, "scenario.text")
    said = ["" if cell is None else str(cell) for cell in cells_N]
    hashed = HashingVectorizer(n_features=WORD_FEATURES, ngram_range=(1, 2), dtype=np.float32).transform(said)
    return np.asarray(hashed.toarray())
