"""Run functions in forked processes, and return their results in order with all arrays in shared memory."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np

from fedlearn.engines.shared_arrays import SharedArrays, SharedMessage

Function = Callable[[Any, Any], Any]  # (shared, argument) -> result
MAX_HELD = 2  # results in use: the new one, and the last one in the variable of a loop


class ProcessDied(RuntimeError):
    """Report a process that ended while it had work, perhaps because memory ran out."""


class _Task(NamedTuple):
    """The number of an argument, and the memory of its result."""

    number: int
    memory: SharedArrays


class _Process(NamedTuple):
    """A process, the parent's end of its pipe, and its tasks in order."""

    process: Any
    pipe: Connection
    tasks: deque[_Task]


class ProcessTeam:
    """Processes that start when there is work for them.

    Args:
        functions: functions ``(shared, argument) -> result``. The processes inherit them.
        num_processes: maximum number of processes, >= 1.
        max_ahead: maximum number of results that wait for earlier results, or for the caller, >= 1.
    """

    def __init__(self, functions: Sequence[Function], *, num_processes: int, max_ahead: int) -> None:
        self.functions, self.num_processes = functions, num_processes
        self._shared = SharedArrays()
        self._memories = [SharedArrays() for _ in range(num_processes + max_ahead + 1)]
        self._free = list(self._memories)  # the last one is used next, so few of them get pages
        self._held: list[tuple[SharedArrays, weakref.ref[np.ndarray]]] = []  # the caller uses arrays in them
        self._processes: list[_Process] = []
        self._depth = 2 if max_ahead > num_processes else 1  # tasks of a process, with the waiting task
        self._calls = 0

    def run(self, function: int, shared: Any, arguments: Sequence[Any]) -> Iterator[Any]:
        """Yield the result of a function for each argument, in order.

        The arrays of a result stay valid as long as the caller uses them.

        Raises:
            ProcessDied: A process died.
            Exception: The error of the function.
        """
        self._calls += 1
        order = (self._calls, function, self._shared.write(shared))
        waiting, done = deque(enumerate(arguments)), dict[int, tuple[SharedArrays, Any]]()
        try:
            for number in range(len(arguments)):
                self._assign(order, waiting)
                while number not in done:
                    done |= self._receive()
                    self._assign(order, waiting)
                yield self._result(*done.pop(number))
        except BaseException:
            self.close()  # processes may still compute
            raise

    @property
    def processes(self) -> Sequence[Any]:
        """The processes that have started."""
        return [each.process for each in self._processes]

    def close(self) -> None:
        """End the processes, also while they compute. Arrays of results stay valid."""
        for each in self._processes:
            each.pipe.close()
        for each in self._processes:
            each.process.terminate()
            each.process.join(timeout=5)
        self._processes.clear()
        for memory in (self._shared, *self._memories):
            memory.close()
        self._memories.clear()
        self._free.clear()

    def _assign(self, order: tuple[int, int, SharedMessage], waiting: deque[tuple[int, Any]]) -> None:
        """Send waiting arguments to the processes with the fewest tasks, while there is memory for their results."""
        self._release()
        while waiting and self._free:
            least = min(self._processes, key=lambda each: len(each.tasks), default=None)
            if (least is None or least.tasks) and len(self._processes) < self.num_processes:
                least = self._start()
            if least is None or len(least.tasks) == self._depth:
                return
            memory = self._free.pop()
            number, argument = waiting.popleft()
            message = (order, self._memories.index(memory), memory.write(argument))
            least.tasks.append(_Task(number, memory))
            try:
                least.pipe.send(message)
            except OSError as error:
                raise ProcessDied(_DIED) from error

    def _receive(self) -> dict[int, tuple[SharedArrays, Any]]:
        """Wait for results, and return them by number with their memory."""
        done = {}
        busy = {each.pipe: each for each in self._processes if each.tasks}
        for pipe in wait(list(busy)):
            assert isinstance(pipe, Connection)
            try:
                result = pipe.recv()
            except (EOFError, OSError) as error:
                raise ProcessDied(_DIED) from error
            task = busy[pipe].tasks.popleft()
            done[task.number] = (task.memory, result)
        return done

    def _result(self, memory: SharedArrays, result: SharedMessage | Exception) -> Any:
        """Return the result of a task. Its arrays are copies if the caller still uses the arrays of other results."""
        if isinstance(result, Exception):
            raise result
        self._release()
        if len(self._held) == MAX_HELD:
            self._free.append(memory)
            return memory.read(result, copy=True)[0]
        value, lifetime = memory.read(result)
        self._held.append((memory, weakref.ref(lifetime)))
        return value

    def _release(self) -> None:
        """Use the memory again whose arrays the caller has dropped."""
        self._free += [memory for memory, lifetime in self._held if lifetime() is None]
        self._held = [item for item in self._held if item[1]() is not None]

    def _start(self) -> _Process:
        """Fork a process, and add it to the team."""
        fork = multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe()
        inherited = [ours, *(each.pipe for each in self._processes)]
        process = fork.Process(target=self._serve, args=(theirs, inherited), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(_Process(process, ours, deque()))
        return self._processes[-1]

    def _serve(self, pipe: Connection, inherited: Sequence[Connection]) -> None:
        """Run functions in a process until the parent closes the pipe."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in inherited:  # a pipe that stays open here would not report the end of the parent
            other.close()
        gc.freeze()  # a collection would copy the pages of all objects of the parent
        _keep_freed_memory()
        call, shared = 0, None
        while True:
            try:
                order, index, argument = pipe.recv()
            except (EOFError, OSError):
                return
            try:
                if order[0] != call:
                    call, shared = order[0], self._shared.read(order[2])[0]
                result: Any = self._compute(order[1], shared, self._memories[index], argument)
            except Exception as error:
                result = error
            pipe.send(result)

    def _compute(self, function: int, shared: Any, memory: SharedArrays, argument: SharedMessage) -> SharedMessage:
        """Return the result of a function. It lies after the argument, because its arrays may be parts of it."""
        result = self.functions[function](shared, memory.read(argument)[0])
        return memory.write(result, start=argument.end)


_DIED = "a process of the pool died, perhaps because memory ran out\n  advice    fewer processes, or batching=map"


def _keep_freed_memory() -> None:
    """Configure glibc to keep all freed memory of this process, unless the user has set its thresholds.

    Otherwise, the kernel clears the pages of each gradient of a large model again. That takes half of a local step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"} & os.environ.keys():
        return
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-4, 0)  # M_MMAP_MAX: no block has pages of its own
