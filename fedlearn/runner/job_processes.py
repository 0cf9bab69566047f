"""Run the jobs of a sweep in forked processes, several at a time. The jobs share the imports of this process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedlearn.core.threads import available_cores, limit_threads
from fedlearn.errors import require

MEMORY_FACTOR = 1.5  # available memory for the start of a job, per memory of the largest running job
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


class JobProcesses:
    """Run functions in forked processes, at most ``size`` at a time. Each process uses its share of the cores.

    A second job starts when the first job has a result, and when the available memory is 1.5 times the memory of a job.

    Args:
        size: largest number of processes, >= 1.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._running: dict[BaseProcess, Path] = {}
        self._num_cores = max(1, available_cores() // size)
        self._has_result = False

    def start(self, job: Callable[[], object], result: Path) -> None:
        """Run a job in a new process, as soon as there is room for it.

        Args:
            job: function to run.
            result: file that the job writes when its memory no longer grows.
        """
        while not self._has_room():
            self._collect(POLL_SECONDS)
        process = multiprocessing.get_context("fork").Process(target=self._run, args=(job,))
        process.start()
        self._running[process] = result

    def wait(self) -> None:
        """Wait for the end of all jobs."""
        while self._running:
            self._collect(None)

    def interrupt(self) -> None:
        """Interrupt all running jobs as Ctrl-C does, and wait for their end. A further Ctrl-C reaches them too."""
        while self._running:
            for process in self._running:
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGINT)
            with suppress(KeyboardInterrupt):
                self.wait()

    def _run(self, job: Callable[[], object]) -> None:
        os.setpgid(0, 0)  # the parent receives Ctrl-C, and passes it on
        ctypes.CDLL(None).prctl(SIGNAL_AT_END_OF_PARENT, signal.SIGTERM)
        limit_threads(self._num_cores)
        with suppress(KeyboardInterrupt):  # the exit code is recorded
            job()

    def _collect(self, seconds: float | None) -> None:
        """Wait for the end of a job, for at most ``seconds``."""
        wait([process.sentinel for process in self._running], seconds)
        for process in [process for process in self._running if not process.is_alive()]:
            process.join()
            del self._running[process]
            self._has_result = True

    def _has_room(self) -> bool:
        if len(self._running) >= self.size:
            return False
        self._has_result = self._has_result or any(result.exists() for result in self._running.values())
        memory = max((_resident_bytes(process.pid) for process in self._running), default=0)
        return not self._running or (self._has_result and MEMORY_FACTOR * memory <= _available_bytes())


def _resident_bytes(process: int | None) -> int:
    """Return the resident memory of a process, bytes; 0 after its end."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _available_bytes() -> float:
    """Return the memory of the machine that processes can use without swapping, bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {line.partition(":")[0]: line.split()[1] for line in lines}
    return 1024 * float(values.get("MemAvailable", "inf"))
