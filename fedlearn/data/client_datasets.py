"""Divide the data sets of named clients into training and held-out examples, each client on request.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.metric import Metric
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientId, Examples
from fedlearn.core.tasks import Task, as_task
from fedlearn.data.from_arrays import as_inputs, held_out
from fedlearn.errors import DataError, FedlearnError, SettingError, require

Collate = Callable[[Sequence[Any]], tuple[Any, Any]]
KEPT_CLIENTS = 64  # clients whose examples stay in memory
CHUNK = 4096  # items of a data set in one call of collate


@dataclass(frozen=True, kw_only=True)
class DatasetReader:
    """Read the data set of a client as arrays.

    Args:
        task: task that checks the targets.
        target: name of the column of targets, for data frames and data sets with columns.
        features: names of the columns of inputs; None takes all columns except for the target.
        classes: names of the classes in the order of their numbers; empty if targets are class numbers.
        collate: function from a list of items to an array of inputs and an array of targets; None stacks pairs. Inputs
            may be a mapping or a tuple of arrays, for a model with several inputs.
    """

    task: Task
    target: str | None = None
    features: tuple[str, ...] | None = None
    classes: tuple[str, ...] = ()
    collate: Collate | None = None

    def read(self, dataset: Any, name: str) -> Examples:
        """Return the examples of a data set.

        Args:
            dataset: pair of arrays, data frame, data set with items, or a function without arguments that returns one
                of them.
            name: name of the client, for errors.

        Raises:
            DataError: the data set has another form, a column is missing, or a value is not valid.
        """
        try:
            x, y = self._arrays(dataset() if callable(dataset) and not hasattr(dataset, "__getitem__") else dataset)
            targets = self.task.targets(self._class_numbers(np.asarray(y)))
            return Examples(x, targets)
        except FedlearnError as error:
            first, *rest = str(error).splitlines()
            raise DataError("\n".join([f"client {name}: {first}", *rest])) from error
        except (ValueError, TypeError, KeyError, IndexError) as error:
            fix = "collate=..., a function from a list of items to an array of inputs and an array of targets"
            problem = f"client {name}: the data set cannot be read: {type(error).__name__}: {error}"
            raise DataError(f"{problem}\n  expected  pairs of an input and a target\n  advice    {fix}") from error

    def columns(self, dataset: Any) -> tuple[str, ...]:
        """Return the names of the columns of inputs."""
        found: Any = getattr(dataset, "column_names", None) or getattr(dataset, "columns", ())
        names = [str(name) for name in found]
        if self.target not in names:
            fix = f"target={names[-1]!r}" if names else "pairs of an input and a target"
            raise DataError(
                f"there is no column {self.target}\n  expected  one of {', '.join(names)}\n  try       {fix}"
            )
        wanted = self.features or tuple(name for name in names if name != self.target)
        missing = [name for name in wanted if name not in names]
        if missing:
            raise DataError(f"there is no column {missing[0]}\n  expected  one of {', '.join(names)}")
        return wanted

    def _arrays(self, dataset: Any) -> tuple[Any, Any]:
        if isinstance(dataset, tuple) and len(dataset) == 2:
            return _inputs(dataset[0]), dataset[1]
        has_columns = hasattr(dataset, "columns") or hasattr(dataset, "column_names")
        if self.collate is None and has_columns:
            columns = self.columns(dataset)  # raises an error for a table without a target
            return _inputs_of_columns({name: _cells(dataset[name]) for name in columns}), np.asarray(
                dataset[self.target]
            )
        items = iter(dataset) if hasattr(dataset, "__iter__") else (dataset[i] for i in range(len(dataset)))
        collate = self.collate or self._stack
        parts = []
        while chunk := list(islice(items, CHUNK)):
            x, y = collate(chunk)
            parts.append((_inputs(x), np.asarray(y)))
        return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])

    def _stack(self, items: Sequence[Any]) -> tuple[Any, Any]:
        """Return inputs and targets of items, which are pairs, or mappings with a target."""
        if isinstance(items[0], Mapping):
            return self._stack_mappings(items)
        x, y = zip(*items, strict=True)
        return _stack_inputs(x), np.stack([np.asarray(item) for item in y])

    def _stack_mappings(self, items: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
        names = [str(name) for name in items[0]]
        if self.target is None or self.target not in names:
            raise DataError(
                f"the items are mappings with the names {', '.join(names)}\n  expected  the name of the target\n"
                f"  try       target={names[-1]!r}"
            )
        wanted = self.features or tuple(name for name in names if name != self.target)
        cells = {name: np.stack([np.asarray(item[name]) for item in items]) for name in wanted}
        return cells, np.stack([np.asarray(item[self.target]) for item in items])

    def _class_numbers(self, y: np.ndarray) -> np.ndarray:
        if not self.classes:
            are_numbers = y.dtype.kind in "iufb"
            fix = "classes=[...] with the names of all classes in order"
            if not are_numbers:
                raise DataError(f"the targets hold {y.dtype}\n  expected  numbers\n  try       {fix}")
            return y
        names = y.astype(str)
        unknown = sorted(set(names.ravel().tolist()) - set(self.classes))
        if unknown:
            fix = f"classes={[*self.classes, *unknown]}"
            raise DataError(
                f"{len(unknown)} names of classes are unknown\n  expected  {', '.join(self.classes)}\n  try       {fix}"
            )
        return np.array([self.classes.index(name) for name in names.ravel().tolist()]).reshape(y.shape)


def _cells(column: Any) -> np.ndarray:
    """Return a column as an array. Cells may be sequences of one length."""
    cells_N = np.asarray(column)
    return np.stack(list(map(np.asarray, cells_N))) if cells_N.dtype == object and len(cells_N) else cells_N


def _inputs_of_columns(cells: Mapping[str, np.ndarray]) -> Any:
    """Return single numbers as one array ``(N, F)``. Columns of sequences are several inputs by name."""
    for name, cell_N in cells.items():
        if cell_N.dtype.kind not in "iufb":
            fix = f"features=[...] without {name}, or collate=..."
            raise DataError(f"column {name} holds no numbers\n  expected  numbers\n  advice    {fix}")
    if len(cells) == 1 and next(iter(cells.values())).ndim > 1:
        return _inputs(next(iter(cells.values())))
    is_table = all(cell_N.ndim == 1 for cell_N in cells.values())
    return _inputs(np.stack(list(cells.values()), axis=1) if is_table else cells)


def _stack_inputs(items: Sequence[Any]) -> Any:
    """Return the inputs of several examples: an array, or a mapping or a tuple of arrays."""
    first = items[0]
    if isinstance(first, Mapping):
        return {name: np.stack([np.asarray(item[name]) for item in items]) for name in first}
    if isinstance(first, tuple) and not all(map(np.isscalar, first)):
        return tuple(np.stack([np.asarray(item[place]) for item in items]) for place in range(len(first)))
    return np.stack([_inputs(item) for item in items])


def _inputs(x: Any) -> np.ndarray:
    """Return inputs as an array of numbers. A mapping or a tuple of arrays has one field for each input.

    Raises:
        DataError: an input is no array of numbers.
    """
    if isinstance(x, Mapping) or (isinstance(x, tuple) and not all(map(np.isscalar, x))):
        try:
            return as_inputs(x)
        except SettingError as error:
            raise DataError(str(error)) from error
    array = np.asarray(x)
    if array.dtype.names is None and array.dtype.kind not in "iufb":
        raise DataError(f"an input holds {array.dtype}\n  expected  an array of numbers\n  advice    collate=...")
    return as_inputs(array)


@dataclass(frozen=True, kw_only=True)
class ClientDatasets:
    """Data sets of named clients, read on request.

    Args:
        datasets: name of a client -> data set.
        reader: reader of the data sets.
        test: name of a client -> held-out data set; empty divides each data set.
        test_share: share that each client holds out without ``test``, in [0, 1).
        seed: seed of the split.
    """

    datasets: Mapping[str, Any]
    reader: DatasetReader
    test: Mapping[str, Any] = field(default_factory=dict)
    test_share: float = 0.25
    seed: int = 1

    def __post_init__(self) -> None:
        is_mapping = isinstance(self.datasets, Mapping) and len(self.datasets) > 0
        expected = "a mapping from the name of a client to its data set"
        shown = f"a {type(self.datasets).__name__}"
        require(is_mapping, "datasets", shown, expected, "{'north': dataset, 'south': dataset}")
        unknown = sorted(set(map(str, self.test)) - set(map(str, self.datasets)))
        require(not unknown, "test", unknown, "names of clients of datasets", "test={}")
        is_share = isinstance(self.test_share, int | float) and 0 <= self.test_share < 1
        require(is_share, "test_share", self.test_share, "a number in [0, 1)", "test_share=0.25")

    def federated(self, *, num_classes: int | None = None, metrics: Sequence[Metric] = ()) -> FederatedData:
        """Return federated data that reads each client on request and keeps some clients in memory.

        Args:
            num_classes: number of classes; None counts them, which reads the data of all clients once.
            metrics: metrics in addition to the metrics of the task.

        Raises:
            DataError: a data set cannot be read.
        """
        names, task = tuple(map(str, self.datasets)), self.reader.task

        @lru_cache(maxsize=KEPT_CLIENTS)
        def sides(client: ClientId) -> tuple[Examples, Examples]:
            return self._sides(names[client], client)

        if num_classes is None and self.reader.classes:
            num_classes = len(self.reader.classes)
        if num_classes is None:
            counts = (task.count_classes(part.y) for client in range(len(names)) for part in sides(client) if len(part))
            num_classes = max(counts, default=1)
        return FederatedData(
            task=task,
            clients=range(len(names)),
            train=lambda client: sides(client)[0],
            test=lambda client: sides(client)[1],
            num_classes=num_classes,
            names=dict(enumerate(names)),
            metrics=metrics,
        )

    def _sides(self, name: str, client: ClientId) -> tuple[Examples, Examples]:
        examples = self.reader.read(self.datasets[name], name)
        if self.test:
            held = self.reader.read(self.test[name], name) if name in self.test else None
            return examples, held or Examples(examples.x[:0], examples.y[:0])
        strata_N = self.reader.task.strata(examples.y)
        test_N = held_out(strata_N, self.test_share, generator(self.seed, Purpose.SPLIT, client=client))
        return Examples(examples.x[~test_N], examples.y[~test_N]), Examples(examples.x[test_N], examples.y[test_N])


def client_datasets(
    datasets: Mapping[str, Any],
    *,
    task: Task | str,
    target: str | None = None,
    features: Sequence[str] | None = None,
    classes: Sequence[Any] = (),
    collate: Collate | None = None,
    test: Mapping[str, Any] | None = None,
    test_share: float = 0.25,
    seed: int = 1,
) -> ClientDatasets:
    """Return the data sets of named clients; see `fedlearn.Scenario.from_datasets`."""
    reader = DatasetReader(
        task=as_task(task),
        target=target,
        features=None if features is None else tuple(features),
        classes=tuple(map(str, classes)),
        collate=collate,
    )
    return ClientDatasets(datasets=datasets, reader=reader, test=test or {}, test_share=test_share, seed=seed)
