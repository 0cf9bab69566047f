"""Check the data and the trainer of a scenario.

Shapes: N examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.lib.array_utils import byte_bounds

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.inputs import input_arrays
from fedlearn.core.records import ClientId, ClientWork, Examples, LocalSettings, Request
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.scenario import Scenario

MAX_CLIENTS = 40  # clients whose examples are compared
CHANCE_OVERLAP = 0.02  # share of held-out examples that may equal a training example by chance


def check_scenario(build: Callable[[], Scenario]) -> None:
    """Check the data and the trainer of a scenario.

    Args:
        build: builds the scenario; it is called twice, e.g. ``functools.partial(heart, seed=3)``.

    Raises:
        AssertionError: a guarantee does not hold; the message names it.

    >>> from fedlearn.data.from_arrays import from_arrays
    >>> from fedlearn.testing.problems import LinearTrainer
    >>> x = np.random.default_rng(1).normal(size=(60, 3))
    >>> def build():
    ...     data = from_arrays(x, x.sum(axis=1), assignment=[0, 1, 2] * 20, task="regression")
    ...     return Scenario(name="sums", data=data, trainer=LinearTrainer(3), model="linear")
    >>> check_scenario(build)
    """
    scenario, again = build(), build()
    assert isinstance(scenario, Scenario), f"it must build a Scenario, not a {type(scenario).__name__}"
    data = scenario.data
    _check_clients(data)
    clients = _sample(data.clients)
    parts = [data.train(client) for client in clients], [data.test(client) for client in clients]
    pooled = [data.pooled_test()] if data.pooled_test is not None else []
    for part in (*parts[0], *parts[1], *pooled):
        _check_examples(part, data, like=parts[0][0])
    for client, train, test in zip(clients, *parts, strict=True):
        same = (again.data.train(client), train), (again.data.test(client), test)
        assert all(_equal(*pair) for pair in same), f"client {client}: two builds must have equal examples"
    _check_disjoint(*parts)
    _check_memory([part for side in parts for part in side])
    _check_trainer(scenario.trainer, data, *parts)
    equal = np.array_equal(scenario.trainer.init(1), again.trainer.init(1))
    assert equal, "two builds must have equal initial parameters"


def _sample(clients: Sequence[ClientId]) -> list[ClientId]:
    positions = np.unique(np.linspace(0, len(clients) - 1, MAX_CLIENTS).round().astype(int))
    return [clients[k] for k in positions]


def _check_clients(data: FederatedData) -> None:
    assert len(data.clients) > 0, "it needs one client or more"
    assert len(set(data.clients)) == len(data.clients), "client numbers must be unique"
    unknown = set(data.names) - set(data.clients)
    assert not unknown, f"names has clients {sorted(unknown)}, which do not exist"
    assert len(set(data.names.values())) == len(data.names), "names of clients must be unique"
    for client in _sample(data.clients) if data.num_train is not None else []:
        stated, found = data.num_train.get(client), len(data.train(client))  # type: ignore[union-attr]
        assert stated == found, f"num_train of client {client} is {stated}, but it has {found} examples"


def _check_examples(part: Examples, data: FederatedData, *, like: Examples) -> None:
    x, y = np.asarray(part.x), np.asarray(part.y)
    for name, array, other in (("x", x, np.asarray(like.x)), ("y", y, np.asarray(like.y))):
        kind = (array.shape[1:], array.dtype) == (other.shape[1:], other.dtype)
        assert kind, f"{name} of all clients must have the same shape and dtype, e.g. {other.shape[1:]} {other.dtype}"
        finite = all(part.dtype.kind != "f" or np.isfinite(part).all() for part in input_arrays(array))
        assert finite, f"{name} must be finite"
    if not data.task.has_classes:
        is_valid = y.dtype.kind == "f" or data.task.decide is not None
        assert is_valid, f"targets of a {data.task} task are real numbers, not {y.dtype}"
        assert np.array_equal(data.task.targets(y), y), f"targets do not have the form of a {data.task} task"
        return
    assert y.dtype.kind in "iu", f"targets of task {data.task} are class numbers, not {y.dtype}"
    classes = max(2, data.num_classes)
    lowest = -1 if y.ndim > 1 else 0  # -1 marks a position of a sequence without target
    fits = not y.size or lowest <= y.min() <= y.max() < classes
    assert fits, f"targets must be class numbers in 0..{classes - 1}"


def _check_disjoint(train: Sequence[Examples], test: Sequence[Examples]) -> None:
    """Check that held-out examples are no training examples of the client, except for duplicates."""
    num_test = num_shared = num_train = num_repeated = 0
    for train_k, test_k in zip(train, test, strict=True):
        rows, held_out = _rows(train_k), _rows(test_k)
        known = set(rows)
        num_shared += sum(row in known for row in held_out)
        num_test, num_train = num_test + len(held_out), num_train + len(rows)
        num_repeated += len(rows) - len(known)
    by_chance = 1 + (CHANCE_OVERLAP + 2 * num_repeated / max(num_train, 1)) * num_test
    assert num_shared <= by_chance, f"{num_shared} of {num_test} held-out examples are training examples"


def _rows(part: Examples) -> list[bytes]:
    return [x.tobytes() + y.tobytes() for x, y in zip(np.asarray(part.x), np.asarray(part.y), strict=True)]


def _check_memory(parts: Sequence[Examples]) -> None:
    arrays = [array for part in parts for array in (part.x, part.y) if isinstance(array, np.ndarray) and array.size]
    by_address = sorted(arrays, key=lambda array: byte_bounds(array)[0])
    for low, high in pairwise(by_address):
        apart = byte_bounds(low)[1] <= byte_bounds(high)[0] or not np.shares_memory(low, high)
        assert apart, (
            "examples of two clients, or of train and test, share memory, so a change of one changes the other"
        )


def _check_trainer(trainer: Trainer, data: FederatedData, train: Sequence[Examples], test: Sequence[Examples]) -> None:
    """Train one step at two clients, and predict."""
    work = [ClientWork(client=k, examples=examples) for k, examples in enumerate(train) if len(examples)][:2]
    assert work, "no client has training examples"
    local = LocalSettings(steps=1, batch_size=8, learning_rate=0.01)
    params_D = trainer.init(1)
    updates = trainer.fit(Request(round=1, seed=1, params_D=params_D, local=local), plain_training, work)
    finite = np.isfinite(np.asarray(updates.delta_KD)).all()
    assert finite, "one training step gives an update that is not finite"
    x = np.asarray(next((part.x for part in test if len(part)), work[0].examples.x))[:4]
    outputs = np.asarray(trainer.predict(params_D, x))
    num_outputs = data.task.num_outputs(data.num_classes)
    fits = (len(outputs), outputs.shape[data.task.class_axis]) == (len(x), num_outputs)
    assert fits, f"the model must have {num_outputs} outputs for task {data.task}, not shape {outputs.shape}"


def _equal(first: Examples, second: Examples) -> bool:
    return np.array_equal(first.x, second.x) and np.array_equal(first.y, second.y)
