"""Restart a process that has had no work for some time, so that it frees the memory of frameworks, data and devices.

Python cannot unload a framework. So the process replaces its program by a new start of the same command. The process
id stays, and so does the supervision by its parent.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from fedlearn.errors import is_number, require

IDLE_TIMEOUT_S = 900.0  # default
FINISH_TIMEOUT_S = 24 * 3600.0  # seconds for a request that arrived just before the restart


def add_idle_option(parser: argparse._ActionsContainer) -> None:
    """Add the option ``--idle-timeout`` to a parser."""
    parser.add_argument(
        "--idle-timeout",
        type=float,
        default=IDLE_TIMEOUT_S,
        metavar="SECONDS",
        help="seconds without a request after which the trainer frees its memory; 0 = never; default 900",
    )


class Activity:
    """Count requests in progress, and measure the time since the end of the last one.

    Args:
        timeout_s: seconds without a request after which the process is idle, >= 0; 0: never.

    Raises:
        SettingError: ``timeout_s`` is out of range.
    """

    def __init__(self, timeout_s: float) -> None:
        expected = "a number of seconds; 0 = never"
        require(is_number(timeout_s, at_least=0), "--idle-timeout", timeout_s, expected, "--idle-timeout 900")
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._num_requests, self._last_end = 0, float("inf")  # a process without a first request has nothing to free

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while the block runs."""
        with self._lock:
            self._num_requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_requests, self._last_end = self._num_requests - 1, time.monotonic()

    def is_idle(self) -> bool:
        """Return whether the process has had a request, and none for the last ``timeout_s`` seconds."""
        with self._lock:
            age_s = time.monotonic() - self._last_end
            return bool(self.timeout_s) and not self._num_requests and age_s >= self.timeout_s


def wait_until_stopped(
    stopped: threading.Event, activity: Activity, can_restart: Callable[[], bool], restart: Callable[[], None]
) -> None:
    """Wait until the process is stopped, and restart it when it is idle.

    Args:
        stopped: event that ends the wait.
        activity: requests of this process.
        can_restart: function that returns whether a new start would succeed; it is asked again after a minute.
        restart: function that returns only after the event.
    """
    poll_s = min(60.0, activity.timeout_s / 4) or None
    while not stopped.wait(poll_s):
        if activity.is_idle() and can_restart():
            restart()


def replace_process(server: grpc.Server, stopped: threading.Event) -> None:
    """Finish the requests in progress, and start the command of this process again. Later requests are sent again.

    The function returns only if the process is stopped before.
    """
    ended = server.stop(FINISH_TIMEOUT_S)
    while not ended.wait(0.5):
        if stopped.is_set():
            return
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it would end the new program before this can handle it
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
