"""Split a cohort over processes: what the bare torch programs use two cores with.

Shapes: D parameters laid flat, W processes, N examples of one client.

Parameters and results lie in shared memory, so that a round sends a few kilobytes of row numbers through pipes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from mmap import mmap
from multiprocessing.connection import Connection

import numpy as np

Share = Sequence[tuple[int, np.ndarray]]  # clients, each with the order in which it visits its examples
Fit = Callable[[np.ndarray, Share], np.ndarray]  # (params_D, share) -> sum over clients of n_k times the new w_k (D)

LONGEST_ROUND = 600.0  # seconds


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def balanced(share: Share, num_parts: int) -> list[list[tuple[int, np.ndarray]]]:
    """Clients in parts of about equal work: the largest first, each to the part that has least to do.

    >>> [[client for client, _ in part] for part in balanced([(k, np.zeros(n)) for k, n in enumerate((9, 5, 5))], 2)]
    [[0], [1, 2]]
    """
    parts: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for client, order_N in sorted(share, key=lambda one: -len(one[1])):
        least = loads.index(min(loads))
        parts[least].append((client, order_N))
        loads[least] += len(order_N)
    return parts


class Processes:
    """The calling process and ``count - 1`` forked ones, each of which fits a part of the cohort.

    Args:
        prepare: makes the function that fits a share; called in each process, after the fork.
        num_parameters: D.
        count: W >= 1.
    """

    def __init__(self, prepare: Callable[[], Fit], *, num_parameters: int, count: int) -> None:
        self._params_D = _shared(1, num_parameters)[0]
        self._sums_WD = _shared(count, num_parameters)
        fork = multiprocessing.get_context("fork")
        self._pipes, self._children = [], []
        for own_D in self._sums_WD[1:]:
            here, there = fork.Pipe()
            self._pipes.append(here)
            self._children.append(
                fork.Process(target=_serve, args=(prepare, there, self._params_D, own_D), daemon=True)
            )
            self._children[-1].start()
        self._fit = prepare()

    def fit(self, params_D: np.ndarray, share: Share) -> np.ndarray:
        """The mean of the new models, weighted by examples.

        Raises:
            TimeoutError: a process does not answer within ten minutes, or not at all.
        """
        self._params_D[:] = params_D
        first, *others = balanced(share, len(self._sums_WD))
        for pipe, part in zip(self._pipes, others, strict=True):
            pipe.send(part)
        self._sums_WD[0] = self._fit(self._params_D, first)
        for pipe in self._pipes:
            if not pipe.poll(LONGEST_ROUND):
                raise TimeoutError(f"no answer from a process within {LONGEST_ROUND:.0f} s")
            pipe.recv()
        return self._sums_WD.sum(axis=0) / np.float32(sum(len(order_N) for _, order_N in share))

    def close(self) -> None:
        """Let the other processes end, and wait for them."""
        for pipe, child in zip(self._pipes, self._children, strict=True):
            pipe.send(None)
            child.join(5.0)


def _serve(prepare: Callable[[], Fit], pipe: Connection, params_D: np.ndarray, sum_D: np.ndarray) -> None:
    fit = prepare()
    while (part := pipe.recv()) is not None:
        sum_D[:] = fit(params_D, part) if part else 0.0
        pipe.send(True)


def _shared(*shape: int) -> np.ndarray:
    """A float32 array that forked processes share."""
    return np.frombuffer(mmap(-1, 4 * int(np.prod(shape))), np.float32).reshape(shape)
