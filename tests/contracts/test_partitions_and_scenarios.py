"""The checks of partitions and scenarios accept the parts of this repository, and reject parts with planted faults."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest

from fedlearn import Scenario
from fedlearn.core.records import Examples
from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.partition import PARTITIONS, Partition, Pathological
from fedlearn.testing import LinearTrainer, check_partition, check_scenario

NUM_FEATURES = 3


@pytest.mark.parametrize("kind", PARTITIONS)
def test_our_partitions_pass(kind):
    check_partition(kind)


def test_a_partition_may_leave_rows_out_if_it_says_so():
    check_partition(Pathological(num_clients=2, classes_per_client=1))


@dataclass(frozen=True, kw_only=True)
class Blocks(Partition):
    """A user's correct partition, which the tests break."""

    num_clients: int | None = 4
    fault: str = ""
    calls: ClassVar[list[int]] = []

    def client_rows(self, rows, seed):
        blocks = np.array_split(np.arange(len(rows)), 4)
        match self.fault:
            case "overlap":
                blocks[1][0] = 0
            case "range":
                blocks[3][-1] = len(rows)
            case "negative":
                blocks[0][0] = -1
            case "float":
                blocks = [block.astype(float) for block in blocks]
            case "lists":
                blocks = [block.tolist() for block in blocks]
            case "mask":
                blocks = [rows.labels_N == k for k in range(4)]
            case "count":
                blocks = [*blocks[:3], *np.array_split(blocks[3], 2)]
            case "lost":
                blocks[2] = blocks[2][1:]
            case "empty":
                blocks[0], blocks[1] = np.concatenate(blocks[:2]), blocks[1][:0]
            case "calls":
                self.calls.append(1)
                blocks = [np.roll(np.arange(len(rows)), len(self.calls))[block] for block in blocks]
            case "numpy":
                blocks = np.array_split(np.random.permutation(len(rows)), 4)  # noqa: NPY002
            case "python":
                shuffled = list(range(len(rows)))
                random.shuffle(shuffled)
                blocks = np.array_split(np.array(shuffled), 4)
            case "inputs":
                rows.labels_N.sort()
            case "classes":
                np.bincount(rows.labels_N)
        return blocks

    def __str__(self):
        return "two\nlines" if self.fault == "text" else "blocks"


def test_a_partition_of_a_user_passes():
    check_partition(Blocks())


@pytest.mark.parametrize(
    ("fault", "promise"),
    {
        "overlap": "at one client only",
        "range": "row numbers must be in",
        "negative": "row numbers must be in",
        "float": "integer dtype",
        "lists": "an array of row numbers",
        "mask": "integer dtype",
        "count": "rows of 4 clients, not of 5",
        "lost": "1 rows are at no client",
        "empty": "client 1 is empty",
        "calls": "equal arguments",
        "numpy": "global generator",
        "python": "equal arguments",
        "inputs": "change its inputs",
        "classes": "needs_classes = True",
        "text": "one line",
    }.items(),
)
def test_a_broken_partition_is_found(fault, promise):
    with pytest.raises(AssertionError, match=promise):
        check_partition(Blocks(fault=fault))


def test_an_empty_client_is_accepted_with_a_warning():
    class Warns(Blocks):
        def client_rows(self, rows, seed):
            warnings.warn("client 1 has no rows", stacklevel=1)
            return Blocks.client_rows(self, rows, seed)

    check_partition(Warns(fault="empty"))


def problem(*, task="binary", changed=lambda data: data, trainer=NUM_FEATURES, seed=1):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(120, NUM_FEATURES)), rng.integers(0, 2, 120)
    y = rng.normal(size=120) if task == "regression" else y
    data = from_arrays(x, y, assignment=np.arange(120) % 4, task=task, seed=1)
    return Scenario(name="problem", data=changed(data), trainer=LinearTrainer(trainer), model="linear")


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_a_scenario_of_a_user_passes(task):
    check_scenario(partial(problem, task=task))


def with_train(change):
    """Change the training examples of client 1."""
    return lambda data: replace(
        data, train=lambda client: change(data.train(client)) if client == 1 else data.train(client)
    )


def copied(part):
    return Examples(part.x.copy(), part.y.copy())


def halved(part):
    return Examples(part.x, part.y / 2.0)


def leaked(data, client):
    train, test = data.train(client), data.test(client)
    return Examples(np.concatenate([test.x[1:], train.x[:1]]), np.concatenate([test.y[1:], train.y[:1]]))


FAULTS = {
    "test is train": (lambda data: replace(data, test=lambda k: copied(data.train(k))), "held-out"),
    "a seventh of test is in train": (lambda data: replace(data, test=lambda k: leaked(data, k)), "held-out"),
    "dtype": (with_train(lambda part: Examples(part.x.astype(np.float64), part.y)), "same shape and dtype"),
    "shape": (with_train(lambda part: Examples(part.x[:, :2], part.y)), "same shape and dtype"),
    "nan": (with_train(lambda part: Examples(np.full_like(part.x, np.nan), part.y)), "finite"),
    "class": (with_train(lambda part: Examples(part.x, part.y + 1)), "class numbers in 0..1"),
    "negative class": (with_train(lambda part: Examples(part.x, part.y - 1)), "class numbers in 0..1"),
    "real classes": (lambda data: replace(data, train=lambda k: halved(data.train(k))), "class numbers, not"),
    "integer regression": (lambda data: replace(data, task="regression"), "real numbers"),
    "names": (lambda data: replace(data, names={0: "north", 1: "north"}), "names of clients must be unique"),
    "strangers": (lambda data: replace(data, names={9: "north"}), "do not exist"),
    "num_train": (lambda data: replace(data, num_train=dict.fromkeys(data.clients, 3)), "num_train of client 0 is 3"),
    "clients": (lambda data: replace(data, clients=[0, 0, 1]), "unique"),
    "no clients": (lambda data: replace(data, clients=[]), "one client or more"),
    "shared memory": (lambda data: replace(data, train=lambda k: data.train(0)), "share memory"),
    "outputs": (lambda data: replace(data, task="multiclass", num_classes=3), "3 outputs"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_scenario_is_found(fault):
    changed, promise = FAULTS[fault]
    with pytest.raises(AssertionError, match=promise):
        check_scenario(partial(problem, changed=changed))


def test_two_builds_that_differ_are_found():
    seeds = iter([1, 2])
    with pytest.raises(AssertionError, match="two builds"):
        check_scenario(lambda: problem(seed=next(seeds)))


def test_a_trainer_that_refuses_the_data_is_found():
    with pytest.raises(Exception, match=r"mismatch|size|shape"):
        check_scenario(partial(problem, trainer=7))


def test_what_is_no_scenario_is_found():
    with pytest.raises(AssertionError, match="a Scenario, not a dict"):
        check_scenario(dict)
