"""Compute class-based partitions with flwr-datasets, which the extra `data` installs.

Shapes: N examples.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.core.random import Purpose, integer_seed
from fedlearn.errors import MissingExtra, SettingError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def dirichlet(labels_N: np.ndarray, *, num_clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Return the rows of each client, with each class divided in Dirichlet(alpha) shares.

    Args:
        labels_N: class numbers.
        num_clients: number of clients, >= 1.
        alpha: concentration, > 0.
        seed: seed of all random choices.

    Raises:
        SettingError: the draws leave clients with too few examples.
    """
    at_least = min(2, len(labels_N) // num_clients)  # one for training, one to hold out
    partitioner = _partitioners("dirichlet").DirichletPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        alpha=alpha,
        min_partition_size=at_least,
        self_balancing=False,
        shuffle=True,
        seed=integer_seed(seed, Purpose.PARTITION),
    )
    try:
        return _load(partitioner, labels_N, num_clients)
    except ValueError as error:
        expected = (
            f"a larger value, fewer clients, or clients of equal size: each of {num_clients} needs {at_least} examples"
        )
        fix = "partition=dirichlet_equal"
        raise SettingError("partition.alpha", alpha, expected, fix) from error


def dirichlet_equal(labels_N: np.ndarray, *, num_clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Return the rows of clients of equal size, with classes in Dirichlet(alpha) shares.

    Args:
        labels_N: class numbers.
        num_clients: number of clients, >= 1.
        alpha: concentration, > 0.
        seed: seed of all random choices.

    Raises:
        SettingError: a client draws only classes that have no examples left.
    """
    partitioner = _partitioners("dirichlet_equal").InnerDirichletPartitioner(
        partition_sizes=[len(rows) for rows in np.array_split(labels_N, num_clients)],
        partition_by="label",
        alpha=alpha,
        shuffle=True,
        seed=integer_seed(seed, Purpose.PARTITION),
    )
    classes_N = np.unique(labels_N, return_inverse=True)[1]  # the partitioner needs numbers without gaps
    try:
        return _load(partitioner, classes_N, num_clients)
    except ValueError as error:
        expected = f"a larger value, so that each of {num_clients} clients draws classes with remaining examples"
        raise SettingError("partition.alpha", alpha, expected, "partition.alpha=0.5") from error


def pathological(labels_N: np.ndarray, *, num_clients: int, classes_per_client: int, seed: int) -> list[np.ndarray]:
    """Return the rows of clients that have examples of a few classes only.

    Args:
        labels_N: class numbers.
        num_clients: number of clients, >= 1.
        classes_per_client: number of classes of each client, >= 1.
        seed: seed of all random choices.

    Raises:
        SettingError: a class has fewer examples than clients.
    """
    partitioner = _partitioners("pathological").PathologicalPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        num_classes_per_partition=classes_per_client,
        class_assignment_mode="first-deterministic",  # all classes are used if there are as many clients as classes
        shuffle=True,
        seed=integer_seed(seed, Purpose.PARTITION),
    )
    try:
        return _load(partitioner, labels_N, num_clients)
    except ValueError as error:
        expected = "a smaller number, so that each class has an example for each of its clients"
        raise SettingError("partition.num_clients", num_clients, expected, "partition.num_clients=10") from error


def _partitioners(kind: str) -> Any:
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        from flwr_datasets import partitioner
    except ImportError as error:
        raise MissingExtra(f"partition={kind}", "data") from error
    return partitioner


def _load(partitioner: Partitioner, labels_N: np.ndarray, num_clients: int) -> list[np.ndarray]:
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"row": np.arange(len(labels_N)), "label": labels_N})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flwr-datasets warns about its retries
        return [np.asarray(partitioner.load_partition(client)["row"][:], np.int64) for client in range(num_clients)]
