"""Start child processes that end with their parent, report each failed process, and restart it."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from fedlearn.core.import_path import ROOT
from fedlearn.core.plain_text import plain_text
from fedlearn.errors import FedlearnError

GRACE_S = 6.0  # seconds for a process to end; wait longer for a process that has child processes itself
PR_SET_PDEATHSIG = 1  # option of prctl(2)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # options of mallopt(3)
LIBC = ctypes.CDLL(None)  # loaded at import, because the loader may be locked after a fork
MAX_RESTARTS = 5  # a process with more restarts within the window has a permanent fault
RESTART_WINDOW_S = 60.0  # seconds
MAX_LOG_BYTES = 64 * 2**20  # size of a log, after which it starts again; the last one stays as NAME.1


class ChildError(FedlearnError):
    """Report a child process that ended or is not ready in time."""


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Make the kernel send a signal to this process when its parent ends, even after SIGKILL (Linux only).

    Args:
        number: number of the signal.
    """
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def private_files() -> Iterator[None]:
    """Create files and folders in this block for the present user only. Processes that it starts do the same."""
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def flower_environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of Flower's programs: a separate home folder, no telemetry, no check for updates.

    Args:
        home: home folder for Flower's files.
        more: further variables.
    """
    return {
        **os.environ,
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def return_freed_memory() -> None:
    """Configure glibc to return freed buffers of messages to the system, in a process that holds no model.

    Otherwise, each thread keeps an area with gaps between buffers of 5 MiB. The function has no effect without glibc.
    """
    mallopt = getattr(LIBC, "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
        mallopt(M_ARENA_MAX, 2)


@dataclass
class Child:
    """A child process that can be restarted.

    Args:
        name: name of the process in messages.
        command: command that starts the process.
        log: file to which the output is appended.
        env: environment; None: the environment of this process.
        cwd: working directory; None: the working directory of this process.
        parent_death_signal: signal that the process receives when its parent dies, default SIGKILL.

    Attributes:
        process: the running process; None before the first start.
        started_at: time of the last start, as a Unix time; 0 before the first start.
        restarts: times of the last restarts, on the monotonic clock.
    """

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    parent_death_signal: int = signal.SIGKILL
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    started_at: float = field(default=0.0, init=False)
    restarts: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RESTARTS), init=False)
    _log_start: int = field(default=0, init=False)  # position in the log at the last start, in bytes

    def start(self) -> None:
        """Start the process in a separate process group, so that only its parent receives Ctrl-C."""
        parent, number = os.getpid(), self.parent_death_signal

        def end_with_parent() -> None:
            die_with_parent(number)
            if os.getppid() != parent:  # the parent died before prctl
                os._exit(1)

        with self.log.open("ab") as log:
            self._log_start, self.started_at = log.tell(), time.time()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.cwd,
                start_new_session=True,
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )

    @property
    def exit_code(self) -> int | None:
        """Exit code; None while the process runs or before its start."""
        return self.process.poll() if self.process else None

    def restart_if_ended(self) -> bool:
        """Restart the process if it has ended, and print a message. Return whether it had ended.

        Raises:
            ChildError: The process ended too often within a short time.
        """
        if self.exit_code is None:
            return False
        sys.stderr.write(f"{self.name} ended with code {self.exit_code}; it is restarted\n")
        self.restart()
        return True

    def restart_delay_s(self, max_s: float) -> float:
        """Return the delay of the next restart: 0 at first, then 1, 2, 4 s and so on for restarts within a minute."""
        recent = [at for at in self.restarts if time.monotonic() - at < RESTART_WINDOW_S]
        return min(max_s, 2.0 ** (len(recent) - 1)) if recent else 0.0

    def restart(self) -> None:
        """Restart the process, unless it ends too often.

        Raises:
            ChildError: The process ended too often within a short time.
        """
        now = time.monotonic()
        if len(self.restarts) == MAX_RESTARTS and now - self.restarts[0] < RESTART_WINDOW_S:
            raise ChildError(
                f"{self.name} ended {MAX_RESTARTS + 1} times within {RESTART_WINDOW_S:.0f} s\n{self.output_tail()}"
            )
        self.restarts.append(now)
        self.start()

    def read_output(self) -> str:
        """Return the output since the last start."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                return log.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def limit_log(self, max_bytes: int = MAX_LOG_BYTES) -> None:
        """Move the contents of a large log to ``NAME.1``, in place of the last one. The process appends to the rest.

        A line that the process writes at this moment can be lost.
        """
        with suppress(OSError):  # a full disk must not end the other work of this process
            if self.log.stat().st_size > max_bytes:
                with self.log.open("rb") as log, self.log.with_name(f"{self.log.name}.1").open("wb") as last:
                    shutil.copyfileobj(log, last)
                os.truncate(self.log, 0)
                self._log_start = 0

    def output_tail(self, num_lines: int = 12) -> str:
        """Return the last lines of the output, indented and without control characters, and the path of the log."""
        tail = plain_text(self.read_output()).split("\n")[-num_lines - 1 :]
        return "\n".join([*(f"    {line}" for line in tail if line), f"  see       {self.log}"])

    def stop(self) -> None:
        """Send SIGTERM to the process, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def reap(self, deadline: float) -> None:
        """Wait for the end of the process; after the deadline, kill its process group.

        Args:
            deadline: time on the monotonic clock, in seconds.
        """
        if self.process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(5)


class Children:
    """A ``with`` block that ends all its processes at its end.

    Args:
        grace_s: seconds for all processes together to end, before they are killed.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.processes: list[Child] = []
        self.grace_s = grace_s

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        deadline = time.monotonic() + self.grace_s
        for child in reversed(self.processes):
            child.stop()
        for child in reversed(self.processes):
            child.reap(deadline)

    def start(self, child: Child) -> Child:
        """Start a process and add it to the block."""
        self.processes.append(child)
        child.start()
        return child

    def check(self) -> None:
        """Raise an error if a process has ended.

        Raises:
            ChildError: A process has ended; the message has its name and its last output.
        """
        for child in self.processes:
            if child.exit_code is not None:
                raise ChildError(f"{child.name} ended {_describe_exit(child.exit_code)}\n{child.output_tail()}")

    def wait_for(self, is_ready: Callable[[], bool], condition: str, *, timeout_s: float) -> None:
        """Wait until a condition is true.

        Args:
            is_ready: function that returns whether the condition is true.
            condition: text of the condition, for the error.
            timeout_s: seconds to wait, > 0.

        Raises:
            ChildError: The condition is false after ``timeout_s``, or a process ended.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            self.check()
            if time.monotonic() > deadline:
                output = "\n".join(child.output_tail() for child in self.processes[-1:])
                raise ChildError(f"{condition}: not within {timeout_s:.0f} s\n{output}")
            time.sleep(0.1)


def _describe_exit(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"


def python_command() -> list[str]:
    """Return the command of this Python, with an option that stops imports from the working folder."""
    return [sys.executable] if Path.cwd() == ROOT else [sys.executable, "-P"]  # with -P a checkout is not importable


def module_command(module: str) -> list[str]:
    """Return the start of a command that runs a module of fedlearn with this Python."""
    return [*python_command(), "-m", module]
