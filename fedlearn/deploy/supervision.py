"""Watch processes by their ability to work: a probe per process, restarts with back-off, and a line per change.

A process that runs can still be unable to work: it hangs, is stopped, or cannot reach the next process. So each
process has a probe, which follows the whole path of its work.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from fedlearn.deploy.processes import Child

REPORT_AFTER_S = 8.0  # seconds with a problem before a line names it
RESTART_AFTER_S = 60.0  # seconds with a problem before the process is restarted
MAX_DELAY_S = 16.0  # longest delay of a restart, in seconds


def say(line: str) -> None:
    """Print a line with the time."""
    sys.stderr.write(f"{datetime.now():%H:%M:%S} {line}\n")
    sys.stderr.flush()


@dataclass
class Watch:
    """A part of a node or coordinator, and the probe of its work.

    Args:
        name: name in messages, e.g. ``the trainer``.
        probe: function that returns the problem of this part; empty if it works. It must return within seconds.
        child: the process; None for a part that this process cannot restart.
        restart_after_s: seconds with a problem before the process is restarted; None: only after its end.
        on_restart: function that is called after each restart.

    Raises:
        ChildError: from `check`, if the process ends too often within a short time.
    """

    name: str
    probe: Callable[[], str]
    child: Child | None = None
    restart_after_s: float | None = RESTART_AFTER_S
    on_restart: Callable[[], None] = lambda: None
    _since: float | None = field(default=None, init=False)  # monotonic time of the first sign of the problem
    _is_reported: bool = field(default=False, init=False)
    _restart_at: float | None = field(default=None, init=False)

    @property
    def works(self) -> bool:
        """True if the last check found no problem."""
        return self._since is None

    def check(self) -> None:
        """Test the part, print a line about a change, and restart its process if it has ended or does not work."""
        now = time.monotonic()
        if self.child is not None:
            self.child.limit_log()
        if self.child is not None and self.child.exit_code is not None:
            self._after_end(self.child, now)
            return
        problem = self.probe()
        if not problem:
            self._works_again(now)
            return
        self._since = self._since or now
        if now - self._since >= REPORT_AFTER_S and not self._is_reported:
            self._is_reported = True
            say(f"{self.name} does not work: {problem}")
        limit = self.restart_after_s
        if self.child is not None and limit is not None and now - self._since >= limit:
            say(f"{self.name} has not worked for {now - self._since:.0f} s; it is killed")
            kill(self.child)
            self._since = now

    def _after_end(self, child: Child, now: float) -> None:
        self._since = self._since or now
        if self._restart_at is None:
            delay_s = child.restart_delay_s(MAX_DELAY_S)
            self._restart_at, self._is_reported = now + delay_s, True
            when = f"in {delay_s:.0f} s" if delay_s else "now"
            say(f"{self.name} ended with code {child.exit_code}; it is restarted {when}")
        if now >= self._restart_at:
            self._restart_at = None
            child.restart()
            self.on_restart()

    def _works_again(self, now: float) -> None:
        if self._since is not None and self._is_reported:
            say(f"{self.name} works again after {now - self._since:.0f} s")
        self._since, self._is_reported = None, False


def kill(child: Child) -> None:
    """Kill a process and its child processes, also if it is stopped."""
    if child.process is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait(10)
