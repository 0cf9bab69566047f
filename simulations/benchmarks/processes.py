"""Divide a cohort among processes. The bare torch programs use all cores this way.

Shapes: D parameters, W processes, N examples of one client.

Parameters and results are in shared memory. A round sends only row numbers through pipes, a few kilobytes.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from mmap import mmap
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

Share = Sequence[tuple[int, np.ndarray]]  # clients, each with the order of its examples
Fit = Callable[[np.ndarray, Share], np.ndarray]  # (params_D, share) -> sum over clients of n_k times the new w_k (D)

LONGEST_ROUND = 600.0  # maximum duration of a round, seconds


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def processor_seconds() -> float:
    """Return the processor time of this process and of its child processes of `multiprocessing`, seconds.

    The time of a running child has a resolution of 10 ms. Other systems than Linux count only children that have ended.
    """
    times = os.times()
    running = [_stat(child.pid) for child in multiprocessing.active_children() if child.pid]
    return time.process_time() + times.children_user + times.children_system + sum(seconds for _, seconds in running)


def tree_processor_seconds() -> float:
    """Return the processor time of this process and of all its descendants, seconds. The search takes milliseconds."""
    found = {int(path.name): _stat(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
    tree, new = set[int](), {os.getpid()}
    while new:
        tree |= new
        new = {process for process, (parent, _) in found.items() if parent in new}
    times = os.times()
    descendants = sum(found[process][1] for process in tree - {os.getpid()})
    return time.process_time() + times.children_user + times.children_system + descendants


def _stat(process: int) -> tuple[int, float]:
    """Return the parent of a process, and the processor time of it and of its children that have ended, seconds."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0.0
    return int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def balanced(share: Share, num_parts: int) -> list[list[tuple[int, np.ndarray]]]:
    """Divide the clients into parts of similar work.

    Clients are assigned in descending order of their numbers of examples, each to the part with the least work.

    >>> [[client for client, _ in part] for part in balanced([(k, np.zeros(n)) for k, n in enumerate((9, 5, 5))], 2)]
    [[0], [1, 2]]
    """
    parts: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for client, order_N in sorted(share, key=lambda item: -len(item[1])):
        least = loads.index(min(loads))
        parts[least].append((client, order_N))
        loads[least] += len(order_N)
    return parts


class Processes:
    """Train parts of a cohort in the calling process and in ``count - 1`` forked ones.

    Args:
        prepare: function that returns the function that trains a share; it is called in each process, after the fork.
        num_parameters: number of parameters D.
        count: number of processes W, >= 1.
    """

    def __init__(self, prepare: Callable[[], Fit], *, num_parameters: int, count: int) -> None:
        self._params_D = _shared(1, num_parameters)[0]
        self._sums_WD = _shared(count, num_parameters)
        fork = multiprocessing.get_context("fork")
        self._pipes, self._children = [], []
        for sum_D in self._sums_WD[1:]:
            here, there = fork.Pipe()
            self._pipes.append(here)
            self._children.append(
                fork.Process(target=_serve, args=(prepare, there, self._params_D, sum_D), daemon=True)
            )
            self._children[-1].start()
        self._fit = prepare()

    def fit(self, params_D: np.ndarray, share: Share) -> np.ndarray:
        """Train a cohort and return the mean of the new models, weighted by examples.

        Raises:
            TimeoutError: A process does not respond within ten minutes.
        """
        self._params_D[:] = params_D
        first, *others = balanced(share, len(self._sums_WD))
        for pipe, part in zip(self._pipes, others, strict=True):
            pipe.send(part)
        self._sums_WD[0] = self._fit(self._params_D, first)
        for pipe in self._pipes:
            if not pipe.poll(LONGEST_ROUND):
                raise TimeoutError(f"a process did not respond within {LONGEST_ROUND:.0f} s")
            pipe.recv()
        return self._sums_WD.sum(axis=0) / np.float32(sum(len(order_N) for _, order_N in share))

    def close(self) -> None:
        """Stop the other processes and wait for them, at most 5 s each."""
        for pipe, child in zip(self._pipes, self._children, strict=True):
            pipe.send(None)
            child.join(5.0)


def _serve(prepare: Callable[[], Fit], pipe: Connection, params_D: np.ndarray, sum_D: np.ndarray) -> None:
    fit = prepare()
    while (part := pipe.recv()) is not None:
        sum_D[:] = fit(params_D, part) if part else 0.0
        pipe.send(True)


def _shared(*shape: int) -> np.ndarray:
    """Return a float32 array in memory that forked processes share."""
    return np.frombuffer(mmap(-1, 4 * int(np.prod(shape))), np.float32).reshape(shape)
