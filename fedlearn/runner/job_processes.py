"""Run the jobs of a sweep in forked processes, several at a time.

A process runs one job after another, as a sweep without processes does. So a process starts JAX and compiles small
programs once for all its jobs. A template imports the libraries for all processes, while its parent prepares the sweep.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fedlearn.core.threads import NUM_CORES, available_cores, core_limit, limit_threads
from fedlearn.errors import require
from fedlearn.runner.process_template import ProcessTemplate

MEMORY_FACTOR = 1.5  # available memory for a further process, per memory of the largest process
MEMORY_FOR_START = 0.2  # available share of the memory of the machine, for a further process
SCARCE_MEMORY = 0.1  # available share of the memory of the machine at which the newest process pauses
POLL_SECONDS = 0.05
WAITING_JOBS = 4  # per process, prepared before a process is free
DONE, INTERRUPTED = "done", "interrupted"  # messages of a process after its job; the first message is its id


def jobs_at_a_time(num_jobs: int | None, engine: Mapping[str, Any], device: str) -> int:
    """Return the number of jobs of a sweep that run at the same time.

    Automatic is one job per core for the engine ``vector`` on a CPU. It is one job at a time for other engines, which
    start processes or serve a debugger, and for other devices. A process that cannot fork also runs one at a time.
    A limit of the cores also limits the jobs.

    Args:
        num_jobs: the setting ``num_jobs``; None is automatic.
        engine: settings of the engine.
        device: device of local training.

    Raises:
        SettingError: this process cannot fork, and ``num_jobs`` is larger than 1.
    """
    if num_jobs is not None:
        require(num_jobs == 1 or can_fork(), "num_jobs", num_jobs, "1, because this process cannot fork", "num_jobs=1")
        return min(num_jobs, core_limit() or num_jobs)
    is_plain = str(engine.get("_target_", "")).endswith(".vector") and device == "cpu"
    return available_cores() if is_plain and can_fork() else 1


def can_fork() -> bool:
    """Return whether a forked process works: on Linux, without other threads, and before JAX starts threads."""
    return sys.platform == "linux" and threading.active_count() == 1 and "jax" not in sys.modules


@dataclass(eq=False, kw_only=True)
class _Process:
    """A process: the parent's end of its pipe, its id, and its job. The id is 0 until the process runs.

    The job is None while the process waits for a job.
    """

    pipe: Connection
    pid: int = 0
    job: Any = None
    is_paused: bool = False

    def signal(self, number: int) -> None:
        """Send a signal to the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def resume(self) -> None:
        """Continue the process after a pause."""
        self.signal(signal.SIGCONT)
        self.is_paused = False


class JobProcesses:
    """Run jobs in forked processes, at most ``size`` at a time. Each process uses its share of the cores.

    A further job starts if 1.5 times the memory of the largest job is available, and a fifth of the memory of the
    machine. While less than a tenth is available, the newest processes pause.

    Args:
        size: number of processes, >= 1.
        prepare: function that is called once for all processes, e.g. to import libraries.
        run: function that runs a job. The processes inherit it; the job is pickled.
        report_death: function that reports a job whose process died, perhaps because memory ran out.

    Attributes:
        num_cores: number of cores of a job.
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
        self._waiting: deque[Any] = deque()
        self._is_interrupted = False
        self.num_cores = max(1, available_cores() // size)
        self._template = ProcessTemplate(self._prepare_template, self._serve)
        for _ in range(size):
            self._fork()

    def start(self, job: Any) -> None:
        """Run a job, as soon as there is room for it. Return at once while few jobs wait."""
        self._waiting.append((dict(os.environ), job))
        self._collect(0)
        while len(self._waiting) > WAITING_JOBS * self.size:
            self._collect(POLL_SECONDS)

    def wait(self) -> None:
        """Wait for the end of all jobs, and end the processes."""
        while self._waiting or any(each.job is not None for each in self._processes):
            self._collect(POLL_SECONDS)
        for each in self._processes:
            each.pipe.close()
        self._processes.clear()
        self._template.close()

    def interrupt(self) -> None:
        """Interrupt all running jobs as Ctrl-C does, and wait for their end. A further Ctrl-C reaches them too.

        Jobs that wait do not start.
        """
        self._waiting.clear()
        self._is_interrupted = True
        if not any(each.pid for each in self._processes):
            self._template.kill()
        is_ended = False
        while not is_ended:
            for each in self._processes:
                if each.job is not None:
                    each.resume()
                    with suppress(ProcessLookupError):
                        os.kill(each.pid, signal.SIGINT)
            with suppress(KeyboardInterrupt):
                self.wait()
                is_ended = True

    def _fork(self) -> None:
        self._processes.append(_Process(pipe=self._template.fork(each.pipe for each in self._processes)))

    def _prepare_template(self) -> None:
        limit_threads(self.num_cores)
        self._prepare()

    def _serve(self, pipe: Connection) -> None:
        """Run jobs in a process, until the parent closes the pipe."""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a command that a script starts with & ignores it
        try:
            for environment, job in _receive_jobs(pipe):
                os.environ.update(environment | {NUM_CORES: str(self.num_cores)})
                self._run(job)
        except KeyboardInterrupt:
            with suppress(OSError):
                pipe.send(INTERRUPTED)

    def _collect(self, seconds: float) -> None:
        """Wait for messages, for at most ``seconds``. Start jobs that wait. Pause processes while memory is scarce."""
        by_pipe = {each.pipe: each for each in self._processes}
        for pipe in wait(list(by_pipe), seconds):
            assert isinstance(pipe, Connection)
            each = by_pipe[pipe]
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = None
            if isinstance(message, int):
                each.pid = message
                continue
            job, each.job = each.job, None
            if each.is_paused:  # the message came before the pause
                each.resume()
            if message != DONE:
                pipe.close()
                self._processes.remove(each)
            if message is None and not each.pid and self._waiting:  # the next process may also die before its job
                _, job = self._waiting.popleft()
            is_dead = message is None or (message == INTERRUPTED and not self._is_interrupted)
            if is_dead and job is not None:
                self._report_death(job)
        self._pause_newest()
        while self._waiting and self._has_room():
            if not self._start_next():
                return

    def _start_next(self) -> bool:
        """Send the next job to a process that waits, and return True. Otherwise, fork a process if one is missing."""
        each = next((each for each in self._processes if each.pid and each.job is None), None)
        if each is None:
            if len(self._processes) < self.size:
                self._fork()
            return False
        environment, each.job = self._waiting.popleft()
        with suppress(OSError):  # the process died, and the pipe reports it
            each.pipe.send((environment, each.job))
        return True

    def _pause_newest(self) -> None:
        """Pause the newest running process while memory is scarce, and continue the oldest paused process after it."""
        running = [each for each in self._processes if each.job is not None and not each.is_paused]
        paused = [each for each in self._processes if each.is_paused]
        share = _available_bytes() / _total_bytes()
        if share < SCARCE_MEMORY and len(running) > 1:
            running[-1].signal(signal.SIGSTOP)
            running[-1].is_paused = True
        elif paused and (share > MEMORY_FOR_START or not running):
            paused[0].resume()

    def _has_room(self) -> bool:
        busy = [each for each in self._processes if each.job is not None]
        if not busy or len(busy) == self.size:
            return not busy
        largest = max(_resident_bytes(each.pid) for each in busy)
        needed = max(MEMORY_FACTOR * largest, MEMORY_FOR_START * _total_bytes())
        return needed <= _available_bytes() and not any(each.is_paused for each in busy)


def _receive_jobs(pipe: Connection) -> Iterator[tuple[dict[str, str], Any]]:
    """Yield the environment and the job of each message, until the parent closes the pipe. Report the end of a job."""
    with suppress(EOFError, OSError):
        pipe.send(os.getpid())
        while True:
            yield pipe.recv()
            pipe.send(DONE)


def _resident_bytes(process: int) -> int:
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
