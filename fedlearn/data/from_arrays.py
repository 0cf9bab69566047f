"""Build the federated data of clients from arrays.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.inputs import has_fields, join_inputs, map_fields
from fedlearn.core.metric import Metric
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Examples
from fedlearn.core.tasks import Task, as_task
from fedlearn.data.partition import Partition, partition_rows
from fedlearn.errors import DataError, is_number, require

Assignment = np.ndarray | Sequence[int] | Sequence[np.ndarray]


def from_arrays(
    x: Any,
    y: np.ndarray,
    *,
    assignment: Assignment,
    task: Task | str,
    test_share: float = 0.25,
    seed: int = 1,
    metrics: Sequence[Metric] = (),
) -> FederatedData:
    """Give each client its rows, and hold out a part of them.

    Args:
        x: ``(N, ...)`` numbers, kept as float32. Values are not checked. Several inputs of a model are a mapping or a
            tuple of arrays; whole numbers keep their types, see `fedlearn.core.inputs`.
        y: ``(N,)`` class numbers from 0, or real targets for ``regression``; see `fedlearn.core.tasks` for others.
        assignment: client of each row, ``(N,)`` integers, or one array of row numbers per client. A client without
            rows is a client without examples. Rows without a client are left out.
        task: a `Task`, or the name of a shipped task, e.g. ``binary``, ``multiclass`` or ``regression``.
        test_share: share that each client holds out, in [0, 1). The number is rounded, stratified by target, and never
            includes the only example of a client.
        seed: seed of the split. The split of a client depends on its rows and its number only.
        metrics: metrics of the user, in addition to the metrics of the task.

    Raises:
        DataError: the targets do not fit the task, or lengths differ.

    *Guarantees*: each assigned row is in exactly one of train and test of its client. Equal arguments give equal splits
    on every machine.

    >>> data = from_arrays(np.eye(4), np.array([0, 1, 0, 1]), assignment=np.array([0, 0, 2, 2]), task="binary")
    >>> [len(data.train(client)) + len(data.test(client)) for client in data.clients]
    [2, 0, 2]
    """
    x = join_inputs(x)
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} examples, but y has {len(y)}\n  advice    one target per example")
    task = as_task(task)
    y_N = task.targets(np.asarray(y))
    rows = rows_of_clients(assignment, num_examples=len(y_N))
    train, test = split_rows(rows, task.strata(y_N), test_share=test_share, seed=seed)
    return from_rows(x, y_N, train=train, test=test, task=task, metrics=metrics)


def partition_arrays(
    x: Any,
    y: np.ndarray,
    partition: Partition,
    *,
    task: Task | str,
    natural_N: np.ndarray | None = None,
    order_N: np.ndarray | None = None,
    seed: int = 1,
) -> FederatedData:
    """Divide arrays among clients by a partition, and hold out a part of the rows of each client.

    Args:
        x: see `from_arrays`.
        y: see `from_arrays`; class numbers are integers.
        partition: result of `fedlearn.data.partition.as_partition`; it also has the test share.
        task: see `from_arrays`.
        natural_N: number of the client that collected each row, from 0; None if unknown.
        order_N: finite numbers that order the rows; None if there are none.
        seed: seed of the partition and of the split.

    Raises:
        SettingError: the partition is not possible with these data.
        DataError: see `from_arrays`.

    >>> from fedlearn.data.partition import Iid
    >>> data = partition_arrays(np.eye(4), np.array([0, 1, 0, 1]), Iid(num_clients=2, test_share=0.5), task="binary")
    >>> [len(data.train(client)) for client in data.clients]
    [1, 1]
    """
    rows = partition_rows(partition, as_task(task).strata(np.asarray(y)), natural_N, order_N=order_N, seed=seed)
    return from_arrays(x, y, assignment=rows, task=task, test_share=partition.held_out_share, seed=seed)


def split_rows(
    rows_K: Sequence[np.ndarray], y_N: np.ndarray, *, test_share: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the training rows and the held-out rows of each client.

    Args:
        rows_K: row numbers of each client.
        y_N: targets, for a stratified split.
        test_share: share that each client holds out, in [0, 1).
        seed: seed of the split.

    Raises:
        SettingError: the share is out of range.
    """
    is_share = is_number(test_share, at_least=0, below=1)
    require(is_share, "test_share", test_share, "a share in [0, 1)", "test_share=0.25")
    parts = [_train_and_test(rows_k, y_N, test_share, seed, client) for client, rows_k in enumerate(rows_K)]
    train, test = zip(*parts, strict=True)
    return list(train), list(test)


def from_rows(
    x: Any,
    y: np.ndarray,
    *,
    train: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    task: Task | str,
    metrics: Sequence[Metric] = (),
) -> FederatedData:
    """Build federated data from the training rows and the held-out rows of each client.

    Args:
        x: see `from_arrays`.
        y: see `from_arrays`.
        train: training rows of each client.
        test: held-out rows of each client.
        task: see `from_arrays`.
        metrics: see `from_arrays`.

    Raises:
        DataError: the targets do not fit the task.
    """
    task = as_task(task)
    y_N = task.targets(np.asarray(y))
    train_K, test_K = (_examples_of_clients(join_inputs(x), y_N, rows) for rows in (train, test))
    return FederatedData(
        task=task,
        clients=range(len(train_K)),
        train=train_K.__getitem__,
        test=test_K.__getitem__,
        num_classes=task.count_classes(y_N),
        metrics=metrics,
    )


def rows_of_clients(assignment: Assignment, *, num_examples: int) -> list[np.ndarray]:
    """Return the row numbers of each client, from either form of an assignment.

    >>> rows_of_clients([1, 1, 0], num_examples=3)
    [array([2]), array([0, 1])]

    Raises:
        DataError: A row number is out of range, or a row has no client number.
    """
    is_array = isinstance(assignment, np.ndarray) and assignment.dtype != object
    if is_array or all(np.ndim(entry) == 0 for entry in assignment):
        client_N = np.asarray(assignment)
        if client_N.shape != (num_examples,) or not np.issubdtype(client_N.dtype, np.integer):
            raise DataError(
                f"assignment has shape {client_N.shape}, expected one client number for each of {num_examples} examples"
            )
        rows = [np.flatnonzero(client_N == client) for client in range(int(client_N.max(initial=-1)) + 1)]
    else:
        rows = [np.asarray(rows_k, np.int64) for rows_k in assignment]
        if any(len(rows_k) and not 0 <= rows_k.min() <= rows_k.max() < num_examples for rows_k in rows):
            raise DataError(f"assignment has row numbers out of range, expected 0..{num_examples - 1}")
    if not rows:
        raise DataError("assignment has no client, expected one or more")
    return rows


def held_out(y_N: np.ndarray, test_share: float, rng: np.random.Generator) -> np.ndarray:
    """Return a mask ``(N,)`` of the examples to hold out.

    The mask takes every 1/share-th example of the examples in order of target. Examples with equal targets are
    shuffled. Each class gives its share to within one example. A class with one example goes to either side. At least
    one example remains for training.

    Args:
        y_N: targets.
        test_share: share to hold out, in [0, 1).
        rng: source of random numbers.
    """
    num_examples = len(y_N)
    num_test = min(num_examples - 1, int(test_share * num_examples + 0.5))
    mask_N = np.zeros(num_examples, bool)
    if num_test < 1:
        return mask_N
    shuffled_N = rng.permutation(num_examples)
    by_target_N = shuffled_N[np.argsort(y_N[shuffled_N], kind="stable")]
    positions = (np.arange(num_test) + rng.random()) * num_examples / num_test
    mask_N[by_target_N[np.minimum(positions.astype(np.int64), num_examples - 1)]] = True
    return mask_N


def _train_and_test(
    rows_k: np.ndarray, y_N: np.ndarray, test_share: float, seed: int, client: int
) -> tuple[np.ndarray, np.ndarray]:
    test_k = held_out(y_N[rows_k], test_share, generator(seed, Purpose.SPLIT, client=client))
    return rows_k[~test_k], rows_k[test_k]


def as_inputs(x: Any) -> np.ndarray:
    """Return inputs as one array. One input becomes float32. Several inputs keep whole numbers and booleans.

    Raises:
        SettingError: an input is no array of numbers; see `fedlearn.core.inputs.join_inputs`.
    """
    joined = join_inputs(x)
    if not has_fields(joined):
        return joined.astype(np.float32, copy=False)
    return map_fields(lambda part: part.astype(np.float32) if part.dtype.kind == "f" else part, joined)


def _examples_of_clients(x: np.ndarray, y_N: np.ndarray, rows: Sequence[np.ndarray]) -> list[Examples]:
    # one copy in order of clients, so that the examples of a client are a view
    rows_N = np.concatenate(rows)
    ends = np.cumsum([len(rows_k) for rows_k in rows]).tolist()
    sorted_x, sorted_y = as_inputs(x[rows_N]), y_N[rows_N]
    starts = [0, *ends[:-1]]
    return [Examples(sorted_x[start:end], sorted_y[start:end]) for start, end in zip(starts, ends, strict=True)]
