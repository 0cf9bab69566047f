"""Shorten the waits of Flower, which polls at long fixed intervals and requests parts of a message too early.

This module changes only the time that Flower sleeps. `fedlearn.flower.compat` installs these waits.
"""

from __future__ import annotations

import time
from typing import Any

INITIAL_BACKOFF_S = 0.05  # seconds before Flower requests missing parts of a message again; doubled at each attempt


def poll_interval(waited_s: float, max_s: float) -> float:
    """Return the time until the next poll, in seconds.

    The interval is a twentieth of the time waited so far, and at least a fifteenth of ``max_s``. So a fast response
    arrives without delay, and a slow response costs few polls (each poll costs the SuperLink ten milliseconds).

    Args:
        waited_s: time waited so far, in seconds, >= 0.
        max_s: time that Flower would sleep, in seconds, > 0.

    >>> [poll_interval(waited, 3.0) for waited in (0, 1, 10, 60, 600)]
    [0.2, 0.2, 0.5, 3.0, 3.0]
    """
    return min(max_s, max(max_s / 15, waited_s / 20))


class PollingClock:
    """Replace Python's ``time`` module for Flower, with shorter sleeps.

    Consecutive sleeps of equal length are one wait. A sleep of another length starts a new wait.
    """

    def __init__(self) -> None:
        self._requested_s, self._waited_s = 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Wait for at most ``seconds``, and for a shorter time at the start of a wait."""
        if seconds != self._requested_s:
            self._requested_s, self._waited_s = seconds, 0.0
        interval_s = poll_interval(self._waited_s, seconds)
        self._waited_s += interval_s
        time.sleep(interval_s)

    def restart(self) -> None:
        """Start a new wait, with short sleeps."""
        self._waited_s = 0.0
