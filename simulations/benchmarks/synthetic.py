"""Synthetic data of the workloads, cohorts, and the order of examples.

Shapes: K clients of a cohort, N examples of one client, P examples in the pool, F features, C classes.

Inputs are random numbers. A random linear teacher gives the labels, so that models can learn; accuracies mean nothing.
All clients share one pool, and a client has a range of consecutive rows. So memory does not grow with the number of
clients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod

import numpy as np

from fedlearn import Examples, FederatedData
from fedlearn.core.random import Purpose, generator
from simulations.benchmarks.workloads import SEED, Workload

POOL_BYTES = 192 * 2**20  # enough for the 60,000 examples of w1

Orders = Callable[[Workload, int, np.ndarray], list[np.ndarray]]  # (workload, round, cohort_K) -> order_N of each


@cache
def pool_of(workload: Workload) -> Examples:
    """Return the examples that all clients share.

    The pool has as many examples as all clients together, but at most 192 MiB.
    """
    fits = POOL_BYTES // (4 * prod(workload.input_shape))
    size = max(workload.largest, min(fits, workload.num_clients * workload.examples_per_client))
    rng = generator(SEED, Purpose.PARTITION)
    x = rng.random((size, *workload.input_shape), np.float32)
    x -= 0.5
    teacher_FC = rng.standard_normal((prod(workload.input_shape), workload.num_classes), np.float32)
    return Examples(x, (x.reshape(size, -1) @ teacher_FC).argmax(axis=1))


def first_rows(workload: Workload) -> Callable[[int], int]:
    """Return a function from a client to its first row in the pool.

    Ranges of consecutive clients are adjacent. At the end of the pool, they start again at its first row.

    >>> from simulations.benchmarks.workloads import W1
    >>> [first_rows(W1)(client) for client in (0, 1, 99)]
    [0, 600, 59400]
    """
    mean = workload.examples_per_client
    num_starts = 1 + (len(pool_of(workload)) - workload.largest) // mean
    return lambda client: client % num_starts * mean


def examples_of(workload: Workload, client: int) -> Examples:
    """Return the examples of a client, as views of the pool."""
    return federated_data(workload).train(client)


def federated_data(workload: Workload) -> FederatedData:
    """Return the data of all clients, without held-out examples."""
    pool, first_row = pool_of(workload), first_rows(workload)

    def train(client: int) -> Examples:
        first = first_row(client)
        end = first + workload.size(client)
        return Examples(pool.x[first:end], pool.y[first:end])

    no_examples = Examples(np.zeros((0, *workload.input_shape), np.float32), np.zeros(0, np.int64))
    return FederatedData(
        task=workload.task,
        num_classes=workload.num_classes,
        clients=range(workload.num_clients),
        train=train,
        test=lambda client: no_examples,
        source="random numbers",
    )


def cohort_of(workload: Workload, round: int) -> np.ndarray:
    """Draw a uniform cohort, in ascending order. The cost grows with the cohort only."""
    rng = np.random.default_rng((SEED, round))
    return np.sort(rng.choice(workload.num_clients, workload.cohort_size, replace=False, shuffle=False))


def poisson_batches(workload: Workload, client: int, order_N: np.ndarray) -> list[np.ndarray]:
    """Draw the rows of a client for each step of DP-SGD. The draw depends on the order of the examples."""
    rng = np.random.default_rng((SEED, client, *order_N[:4].tolist()))
    rate = min(1.0, workload.batch_size / len(order_N))
    steps = -(-len(order_N) // workload.batch_size)
    return [np.flatnonzero(chosen_N) for chosen_N in rng.random((steps, len(order_N))) < rate]


def shuffled(workload: Workload, round: int, cohort_K: np.ndarray) -> list[np.ndarray]:
    """Draw the order of the examples of each client in a cohort.

    One generator serves the whole cohort, which is cheap. In `fedlearn`, each client has its own stream of random
    numbers. So runs can be resumed, and a result does not depend on the process that trains a client.
    """
    rng = np.random.default_rng((SEED, round, 1))
    if workload.spread:
        return [rng.permutation(workload.size(client)) for client in cohort_K.tolist()]
    orders_KN = np.tile(np.arange(workload.examples_per_client), (len(cohort_K), 1))
    return list(rng.permuted(orders_KN, axis=1, out=orders_KN))
