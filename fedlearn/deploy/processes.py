"""Processes that end when they should: with their parent, within seconds, and never unnoticed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from fedlearn.core.import_path import ROOT
from fedlearn.errors import FedlearnError

GRACE_S = 6.0  # seconds; whoever ends a process that has children of its own must wait longer
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # now: after a fork the loader may be locked
MAX_RESTARTS, RESTART_WINDOW_S = (
    5,
    60.0,
)  # more restarts than that within so many seconds: something is wrong that will stay wrong


class ChildError(FedlearnError):
    """A process that was started ended, or did not become ready."""


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel for a signal as soon as this process's parent is gone, however it went (Linux only)."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, number)


def flower_environment(home: Path, **more: str) -> dict[str, str]:
    """The environment for Flower's programs: a home of their own, no telemetry, no look for updates."""
    return {
        **os.environ,
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        **more,
    }


@dataclass
class Child:
    """A process, and how to start it again.

    Args:
        name: for messages.
        command: what to run.
        log: where its output goes, appended.
        env: its environment; this process's where it is None.
        cwd: its working directory.
        parent_death_signal: the signal that it gets when its parent dies without ending it.
    """

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    parent_death_signal: int = signal.SIGKILL
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    restarts: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RESTARTS), init=False)
    _began: int = field(default=0, init=False)  # where in the log its present life begins

    def start(self) -> None:
        """Start it, in a process group of its own, so that a Ctrl-C reaches its parent only."""
        parent, number = os.getpid(), self.parent_death_signal

        def tie() -> None:
            die_with_parent(number)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

        with self.log.open("ab") as log:
            self._began = log.tell()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.cwd,
                start_new_session=True,
                preexec_fn=tie if sys.platform == "linux" else None,
            )

    @property
    def exit_code(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self.process.poll() if self.process else None

    def restart_if_ended(self) -> bool:
        """Start the process again if it has ended, and say so; return whether it had ended.

        Raises:
            ChildError: the process ended too often within a short time.
        """
        if self.exit_code is None:
            return False
        sys.stderr.write(f"{self.name} ended with code {self.exit_code}; starting it again\n")
        self.restart()
        return True

    def restart(self) -> None:
        """Start the process again.

        Raises:
            ChildError: the process ended too often within a short time.
        """
        now = time.monotonic()
        if len(self.restarts) == MAX_RESTARTS and now - self.restarts[0] < RESTART_WINDOW_S:
            raise ChildError(
                f"{self.name} ended {MAX_RESTARTS + 1} times within {RESTART_WINDOW_S:.0f} s\n{self.output_tail()}"
            )
        self.restarts.append(now)
        self.start()

    def read_output(self) -> str:
        """All that it has printed since it was started."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._began)
                return log.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def output_tail(self, num_lines: int = 12) -> str:
        """The end of that, indented, and where to find the rest."""
        tail = self.read_output().splitlines()[-num_lines:]
        return "\n".join([*(f"    {line}" for line in tail), f"  see       {self.log}"])

    def stop(self) -> None:
        """Ask it to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def reap(self, deadline: float) -> None:
        """Wait for its end, at most until a moment of the monotonic clock; then kill it and all that it started."""
        if self.process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(5)


class Children:
    """A ``with`` block that leaves no process behind.

    Args:
        grace_s: seconds that they have together for an orderly end before they are killed.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.processes: list[Child] = []
        self.grace_s = grace_s

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        until = time.monotonic() + self.grace_s
        for child in reversed(self.processes):
            child.stop()
        for child in reversed(self.processes):
            child.reap(until)

    def start(self, child: Child) -> Child:
        """Start a process that ends with the block at the latest."""
        self.processes.append(child)
        child.start()
        return child

    def check(self) -> None:
        """Raise if one of them has ended.

        Raises:
            ChildError: which one, and its last words.
        """
        for child in self.processes:
            if child.exit_code is not None:
                raise ChildError(f"{child.name} ended {_how(child.exit_code)}\n{child.output_tail()}")

    def wait_for(self, is_ready: Callable[[], bool], condition: str, *, timeout_s: float) -> None:
        """Wait until something is so.

        Raises:
            ChildError: it is not so after ``timeout_s``, or a process ended meanwhile.
        """
        until = time.monotonic() + timeout_s
        while not is_ready():
            self.check()
            if time.monotonic() > until:
                words = "\n".join(child.output_tail() for child in self.processes[-1:])
                raise ChildError(f"{condition}: not within {timeout_s:.0f} s\n{words}")
            time.sleep(0.1)


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"


def python_command() -> list[str]:
    """Return the command of this Python; it does not import from the working folder before installed packages."""
    return [sys.executable] if Path.cwd() == ROOT else [sys.executable, "-P"]  # -P would hide a checkout


def module_command(module: str) -> list[str]:
    """Return the start of a command that runs a module of fedlearn with this Python."""
    return [*python_command(), "-m", module]
