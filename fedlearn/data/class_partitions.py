"""Compute class-based partitions. They equal the partitions of flwr-datasets 0.6 bit for bit.

The import of flwr-datasets takes two seconds, because it loads pandas, scipy, matplotlib and datasets.

Shapes: N examples, K clients, C classes.
"""

from __future__ import annotations

import numpy as np

from fedlearn.core.random import Purpose, integer_seed
from fedlearn.errors import SettingError

MAX_ATTEMPTS = 11  # draws until each client has enough examples


def dirichlet(
    labels_N: np.ndarray, *, num_clients: int, alpha: float, seed: int, self_balancing: bool = False
) -> list[np.ndarray]:
    """Return the rows of each client, with each class divided in Dirichlet(alpha) shares.

    Args:
        labels_N: class numbers.
        num_clients: number of clients, >= 1.
        alpha: concentration, > 0.
        seed: seed of all random choices.
        self_balancing: whether a client with more than the mean number of examples gets no examples of later classes.

    Raises:
        SettingError: the draws leave clients with too few examples.
    """
    rng = _generator(seed)
    at_least = min(2, len(labels_N) // num_clients)  # one for training, one to hold out
    rows_of_class = [np.flatnonzero(labels_N == label) for label in np.unique(labels_N)]
    for _ in range(MAX_ATTEMPTS):
        parts, sizes_K = [], np.zeros(num_clients)
        for rows in rows_of_class:
            shares_K = rng.dirichlet(np.full(num_clients, float(alpha)))
            if self_balancing:
                shares_K = np.where(sizes_K > len(labels_N) / num_clients, 0.0, shares_K)
                shares_K = shares_K / sum(shares_K.tolist())
            parts.append(_shares(rows, shares_K))
            sizes_K += [len(part) for part in parts[-1]]
        clients = [np.concatenate(client_parts) for client_parts in zip(*parts, strict=True)]
        if min(map(len, clients)) >= at_least:
            return [_shuffled(rows, rng) for rows in clients]
    expected = (
        f"a larger value, fewer clients, or clients of equal size: each of {num_clients} needs {at_least} examples"
    )
    raise SettingError("partition.alpha", alpha, expected, "partition=dirichlet_equal")


def dirichlet_equal(labels_N: np.ndarray, *, num_clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Return the rows of clients of equal size, with classes in Dirichlet(alpha) shares.

    Clients take turns at random. Each takes an example of a class that it draws from its own shares of the classes
    with remaining examples.

    Args:
        labels_N: class numbers.
        num_clients: number of clients, >= 1.
        alpha: concentration, > 0.
        seed: seed of all random choices.

    Raises:
        SettingError: a client draws only classes that have no examples left.
    """
    rng = _generator(seed)
    remaining = [np.flatnonzero(labels_N == label).tolist() for label in np.unique(labels_N)]
    shares_KC = rng.dirichlet(np.full(len(remaining), float(alpha)), size=num_clients)
    clients = [np.zeros(len(rows), np.int64) for rows in np.array_split(labels_N, num_clients)]
    places, waiting = [len(rows) for rows in clients], list(range(num_clients))
    try:
        while any(places):
            client = waiting[rng.integers(len(waiting))]
            if not places[client]:
                waiting.remove(client)
                continue
            places[client] -= 1
            while not remaining[label := rng.choice(len(remaining), p=shares_KC[client])]:
                shares_KC[:, label] = 0
                with np.errstate(invalid="ignore"):
                    shares_KC = shares_KC / shares_KC.sum(axis=1, keepdims=True)
            clients[client][places[client]] = remaining[label].pop()
    except ValueError as error:  # no share remains
        expected = f"a larger value, so that each of {num_clients} clients draws classes with remaining examples"
        raise SettingError("partition.alpha", alpha, expected, "partition.alpha=0.5") from error
    return [_shuffled(rows, rng) for rows in clients]


def pathological(labels_N: np.ndarray, *, num_clients: int, classes_per_client: int, seed: int) -> list[np.ndarray]:
    """Return the rows of clients that have examples of a few classes only.

    The first class of a client follows from its number, so that many clients use all classes.

    Args:
        labels_N: class numbers.
        num_clients: number of clients, >= 1.
        classes_per_client: number of classes of each client, >= 1.
        seed: seed of all random choices.

    Raises:
        SettingError: a class has fewer examples than clients.
    """
    rng, classes = _generator(seed), np.unique(labels_N).tolist()
    chosen: list[list[int]] = [[classes[client % len(classes)]] for client in range(num_clients)]
    for labels in chosen:
        while len(labels) < classes_per_client:
            label = classes[rng.integers(len(classes))]
            if label not in labels:
                labels.append(label)
    clients: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label in classes:
        holders, rows = [client for client in range(num_clients) if label in chosen[client]], labels_N == label
        if len(holders) > rows.sum():
            expected = "a smaller number, so that each class has an example for each of its clients"
            raise SettingError("partition.num_clients", num_clients, expected, "partition.num_clients=10")
        for client, part in zip(holders, np.array_split(np.flatnonzero(rows), len(holders) or 1), strict=False):
            clients[client].append(part)
    return [_shuffled(np.concatenate(parts), rng) for parts in clients]


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(integer_seed(seed, Purpose.PARTITION))


def _shares(rows: np.ndarray, shares_K: np.ndarray) -> list[np.ndarray]:
    """Divide rows into consecutive parts with these shares."""
    return np.split(rows, (np.cumsum(shares_K) * len(rows)).astype(int)[:-1])


def _shuffled(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shuffled = rows.tolist()  # NumPy shuffles an array in another order
    rng.shuffle(shuffled)
    return np.array(shuffled, np.int64)
