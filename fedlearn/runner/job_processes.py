"""Run the jobs of a sweep in forked processes, several at a time.

A process runs one job after another, as a sweep without processes does. So a process imports libraries, starts JAX and
compiles small programs once for all its jobs. It imports the framework while its parent prepares the sweep.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedlearn.core.threads import NUM_CORES, available_cores, limit_threads
from fedlearn.errors import require

MEMORY_FACTOR = 1.5  # available memory for a further process, per memory of the largest process
MEMORY_FOR_START = 0.2  # available share of the memory of the machine, for a further process
SCARCE_MEMORY = 0.1  # available share of the memory of the machine at which the newest process pauses
POLL_SECONDS = 0.05
SIGNAL_AT_END_OF_PARENT = 1  # option of prctl


def jobs_at_a_time(num_jobs: int | None, engine: Mapping[str, Any], device: str) -> int:
    """Return the number of jobs of a sweep that run at the same time.

    Automatic is one job per core for the engine ``vector`` on a CPU. It is one job at a time for other engines, which
    start processes or serve a debugger, and for other devices. A process that cannot fork also runs one at a time.

    Args:
        num_jobs: the setting ``num_jobs``; None is automatic.
        engine: settings of the engine.
        device: device of local training.

    Raises:
        SettingError: this process cannot fork, and ``num_jobs`` is larger than 1.
    """
    if num_jobs is not None:
        require(num_jobs == 1 or can_fork(), "num_jobs", num_jobs, "1, because this process cannot fork", "num_jobs=1")
        return num_jobs
    is_plain = str(engine.get("_target_", "")).endswith(".vector") and device == "cpu"
    return available_cores() if is_plain and can_fork() else 1


def can_fork() -> bool:
    """Return whether a forked process works: on Linux, without other threads, and before JAX starts threads."""
    return sys.platform == "linux" and threading.active_count() == 1 and "jax" not in sys.modules


@dataclass(eq=False, kw_only=True)
class _Process:
    """A process, the parent's end of its pipe, and its job; None while it waits for a job."""

    process: BaseProcess
    pipe: Connection
    job: Any = None
    is_paused: bool = False

    def signal(self, number: int) -> None:
        """Send a signal to the process and its children."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class JobProcesses:
    """Run jobs in forked processes, at most ``size`` at a time. Each process uses its share of the cores.

    A further job starts if 1.5 times the memory of the largest job is available, and a fifth of the memory of the
    machine. While less than a tenth is available, the newest processes pause.

    Args:
        size: number of processes, >= 1.
        prepare: function that each process calls first, e.g. to import libraries.
        run: function that runs a job. The processes inherit it; the job is pickled.
        report_death: function that reports a job whose process died, perhaps because memory ran out.
    """

    def __init__(
        self,
        size: int,
        *,
        prepare: Callable[[], object],
        run: Callable[[Any], object],
        report_death: Callable[[Any], object],
    ) -> None:
        self.size, self._prepare, self._run, self._report_death = size, prepare, run, report_death
        self._processes: list[_Process] = []
        self._num_cores = max(1, available_cores() // size)
        for _ in range(size):
            self._fork()

    def start(self, job: Any) -> None:
        """Run a job, as soon as there is room for it."""
        while not self._has_room():
            self._collect(POLL_SECONDS)
        process = next((each for each in self._processes if each.job is None), None) or self._fork()
        process.pipe.send((dict(os.environ), job))
        process.job = job

    def wait(self) -> None:
        """Wait for the end of all jobs, and end the processes."""
        while any(each.job is not None for each in self._processes):
            self._collect(POLL_SECONDS)
        for each in self._processes:
            each.pipe.close()
            each.process.join()
        self._processes.clear()

    def interrupt(self) -> None:
        """Interrupt all running jobs as Ctrl-C does, and wait for their end. A further Ctrl-C reaches them too."""
        while self._processes:
            for each in self._processes:
                if each.job is not None and each.process.pid is not None:
                    each.signal(signal.SIGCONT)
                    os.kill(each.process.pid, signal.SIGINT)
            with suppress(KeyboardInterrupt):
                self.wait()

    def _fork(self) -> _Process:
        fork = multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe()
        inherited = [ours, *(each.pipe for each in self._processes)]
        process = fork.Process(target=self._serve, args=(theirs, inherited))
        process.start()
        theirs.close()
        self._processes.append(_Process(process=process, pipe=ours))
        return self._processes[-1]

    def _serve(self, pipe: Connection, inherited: list[Connection]) -> None:
        """Run jobs in a process, until the parent closes the pipe."""
        os.setpgid(0, 0)  # the parent receives Ctrl-C, and passes it on
        ctypes.CDLL(None).prctl(SIGNAL_AT_END_OF_PARENT, signal.SIGTERM)
        for other in inherited:  # a pipe that stays open here would not report the end of the parent
            other.close()
        with suppress(KeyboardInterrupt, EOFError, OSError):  # the exit code of an interrupted job is recorded
            limit_threads(self._num_cores)
            self._prepare()
            while True:
                environment, job = pipe.recv()
                os.environ.update(environment | {NUM_CORES: str(self._num_cores)})
                self._run(job)
                pipe.send(None)

    def _collect(self, seconds: float) -> None:
        """Wait for the end of a job, for at most ``seconds``. Pause processes while memory is scarce."""
        busy = {each.pipe: each for each in self._processes if each.job is not None}
        for pipe in wait(list(busy), seconds):
            assert isinstance(pipe, Connection)
            try:
                pipe.recv()
            except (EOFError, OSError):
                self._remove(busy[pipe])
            busy[pipe].job = None
        self._pause_newest()

    def _remove(self, each: _Process) -> None:
        """Remove a process that has ended in a job: interrupted, or dead."""
        each.process.join()
        each.pipe.close()
        self._processes.remove(each)
        if each.process.exitcode:
            self._report_death(each.job)

    def _pause_newest(self) -> None:
        """Pause the newest running process while memory is scarce, and continue the oldest paused process after it."""
        running = [each for each in self._processes if each.job is not None and not each.is_paused]
        paused = [each for each in self._processes if each.is_paused]
        share = _available_bytes() / _total_bytes()
        if share < SCARCE_MEMORY and len(running) > 1:
            running[-1].signal(signal.SIGSTOP)
            running[-1].is_paused = True
        elif paused and (share > MEMORY_FOR_START or not running):
            paused[0].signal(signal.SIGCONT)
            paused[0].is_paused = False

    def _has_room(self) -> bool:
        busy = [each for each in self._processes if each.job is not None]
        if not busy or len(busy) == self.size:
            return not busy
        largest = max(_resident_bytes(each.process.pid) for each in busy)
        needed = max(MEMORY_FACTOR * largest, MEMORY_FOR_START * _total_bytes())
        return needed <= _available_bytes() and not any(each.is_paused for each in busy)


def _resident_bytes(process: int | None) -> int:
    """Return the resident memory of a process, bytes; 0 after its end."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _available_bytes() -> float:
    """Return the memory of the machine that processes can use without swapping, bytes."""
    return _memory("MemAvailable")


def _total_bytes() -> float:
    """Return the memory of the machine, bytes."""
    return _memory("MemTotal")


def _memory(name: str) -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {line.partition(":")[0]: line.split()[1] for line in lines}
    return 1024 * float(values[name])
