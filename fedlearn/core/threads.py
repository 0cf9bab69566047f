"""Set the number of cores of a run, and compute on them with threads of Python.

This is the only place that sets the threads of libraries. A run divides its work among the cores itself: torch into
processes, XLA into shares of a block, and rules into threads. A library then has one thread in each of them. A BLAS
library with several threads waits in busy loops for a core that another process uses.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from itertools import chain, islice
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

THREADS_PER_LIBRARY = 1  # torch, programs of XLA, and BLAS
NUM_CORES = "FEDLEARN_NUM_CORES"
XLA_POOL = "NPROC"  # XLA reads its number of threads here, when it starts
LIBRARIES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS")
Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Return the number of processor cores that this process may use: at most the number of `limit_threads`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, core_limit() or cores)


def core_limit() -> int | None:
    """Return the number of cores of `limit_threads`; None without a limit."""
    limit = os.environ.get(NUM_CORES, "")
    return int(limit) or None if limit.isdecimal() else None


def limit_threads(num_cores: int | None = None) -> None:
    """Limit this process and its later child processes to a number of cores, with one thread per library.

    Existing variables of the libraries keep their values in child processes.

    Args:
        num_cores: number of cores, >= 1; None keeps ``FEDLEARN_NUM_CORES``, or all cores of the machine.
    """
    if num_cores is not None:
        os.environ[NUM_CORES] = str(num_cores)
    os.environ[XLA_POOL] = str(available_cores())
    for name in LIBRARIES:
        os.environ.setdefault(name, str(THREADS_PER_LIBRARY))  # for libraries that are not loaded yet, and for workers
    _controller().limit(limits=THREADS_PER_LIBRARY, user_api="blas")


def num_threads() -> int:
    """Return the number of threads for computations: ``OMP_NUM_THREADS``, and at most the number of cores."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    return min(available_cores(), int(setting)) if setting.isdecimal() and int(setting) else available_cores()


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield ``function(item)`` for each item, in order, computed on all cores.

    At most two results per thread wait for the caller. Results do not depend on the number of threads if the function
    depends on its item only. BLAS has one thread until the caller has all results, or closes the iterator.
    """
    size, remaining = num_threads(), iter(items)
    first = list(islice(remaining, 2 * size))
    with single_blas_thread():
        if min(size, len(first)) <= 1:
            yield from map(function, chain(first, remaining))
            return
        with ThreadPoolExecutor(size) as pool:
            waiting: deque[Future[Result]] = deque(pool.submit(function, item) for item in first)
            try:
                while waiting:
                    yield waiting.popleft().result()
                    waiting.extend(pool.submit(function, item) for item in islice(remaining, 1))
            finally:
                for future in waiting:
                    future.cancel()


def single_blas_thread() -> AbstractContextManager[Any]:
    """Return a context in which the BLAS of NumPy and SciPy use one thread in this process."""
    limit: AbstractContextManager[Any] = _controller().limit(limits=THREADS_PER_LIBRARY, user_api="blas")
    return limit


@cache
def _controller() -> ThreadpoolController:
    """Return the controller of the loaded libraries. The search for them takes milliseconds, so it happens once."""
    return ThreadpoolController()
