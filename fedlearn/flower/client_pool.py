"""Run the ClientApp of a Flower app in several processes, so that clients that train for seconds use all cores.

A process imports the app itself. A message and the state of its node go to any free process, and return from it. So the
results do not depend on the number of processes, if a ClientApp depends on its message and its context only.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlearn.errors import is_count, require
from fedlearn.flower.app_components import load_component
from fedlearn.flower.compat.messages import identify_as_server
from fedlearn.flower.in_process_grid import CLIENT_APP_RAISED_EXCEPTION, Outcome, call_client

THREADS_ENV = "OMP_NUM_THREADS"
_client_app: Any = None  # in a process of the pool: its ClientApp


@dataclass(frozen=True)
class ClientSource:
    """The place of a ClientApp.

    Attributes:
        project: pyproject.toml of the app.
        reference: ``module:attribute`` of the ClientApp.
    """

    project: Path
    reference: str


class ClientPool:
    """Processes that run a ClientApp. They start with the first messages.

    Args:
        source: place of the ClientApp.
        num_workers: number of processes, >= 1.
        num_threads: threads of each process, >= 1.

    Guarantees:
        A process that ends fails its message only, and is replaced.

    Raises:
        SettingError: ``num_workers`` is out of range.
    """

    def __init__(self, source: ClientSource, num_workers: int, num_threads: int) -> None:
        require(is_count(num_workers), "workers", num_workers, "a whole number >= 1", "workers=2")
        self.source, self.num_workers, self.num_threads = source, num_workers, num_threads
        self._executors = [self._new_executor() for _ in range(num_workers)]  # one process each, so that each can end
        self._futures: list[Future[Outcome] | None] = [None] * num_workers

    def submit(self, message: Message, context: Context) -> Future[Outcome]:
        """Handle a message in a free process. The caller submits at most ``num_workers`` messages at a time."""
        free = next(i for i, future in enumerate(self._futures) if future is None or future.done())
        try:
            future = self._submit(free, message, context)
        except BrokenProcessPool:  # the process has ended
            self._executors[free].shutdown(wait=False)
            self._executors[free] = self._new_executor()
            future = self._submit(free, message, context)
        self._futures[free] = future
        return future

    def result(self, future: Future[Outcome]) -> Outcome:
        """Return the outcome of a message that was handled."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            text = "the process of the ClientApp ended"
            return Outcome(code=CLIENT_APP_RAISED_EXCEPTION, reason=text, error=text, trace=f"{text}: {error}\n")

    def close(self) -> None:
        """End all processes of the pool, even busy ones."""
        for executor in self._executors:
            for process in [*(executor._processes or {}).values()]:
                process.terminate()
            executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, number: int, message: Message, context: Context) -> Future[Outcome]:
        present = os.environ.get(THREADS_ENV)
        os.environ[THREADS_ENV] = present or str(self.num_threads)  # a new process reads it before its first import
        try:
            return self._executors[number].submit(_handle, message, context)
        finally:
            if present is None:
                del os.environ[THREADS_ENV]

    def _new_executor(self) -> ProcessPoolExecutor:
        method = multiprocessing.get_context("spawn")  # a copy of a process with threads of PyTorch can hang
        return ProcessPoolExecutor(1, method, initializer=_start, initargs=(self.source,))


def _start(source: ClientSource) -> None:
    """Prepare a process of the pool: import the app."""
    global _client_app
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends its processes
    sys.path.insert(0, str(source.project.parent))
    _client_app = load_component(source.reference, ClientApp, source.project)
    identify_as_server()


def _handle(message: Message, context: Context) -> Outcome:
    return call_client(_client_app, message, context)
