"""Compute on all cores with threads of Python; the linear algebra library then uses one thread each.

NumPy releases the interpreter lock in its loops. A BLAS library with threads of its own waits in busy loops for a core
that another process uses. So this module limits BLAS to one thread, and divides the work itself.
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

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    limit: AbstractContextManager[Any] = _controller().limit(limits=1, user_api="blas")
    return limit


@cache
def _controller() -> ThreadpoolController:
    """Return the controller of the loaded libraries. The search for them takes milliseconds, so it happens once."""
    return ThreadpoolController()
