"""Shorten the waits of Flower, which polls at long fixed intervals and looks for parts of a message too early.

Only the time that Flower sleeps is changed; `fedlearn.flower.compat` puts these waits in place.
"""

from __future__ import annotations

import time
from typing import Any

INITIAL_BACKOFF_S = 0.05  # seconds before missing parts of a message are requested again; doubled at each attempt


def poll_interval(waited_s: float, max_s: float) -> float:
    """Return the seconds until the next poll, after ``waited_s`` seconds, where Flower would sleep ``max_s``.

    The interval is a twentieth of the time waited, and at least a fifteenth of ``max_s``. So a fast response is found
    fast, and a slow response costs few polls (each costs the SuperLink ten milliseconds).

    >>> [poll_interval(waited, 3.0) for waited in (0, 1, 10, 60, 600)]
    [0.2, 0.2, 0.5, 3.0, 3.0]
    """
    return min(max_s, max(max_s / 15, waited_s / 20))


class PollingClock:
    """Python's ``time`` module with shorter sleeps.

    A wait is a series of sleeps of equal length; another length begins another wait.
    """

    def __init__(self) -> None:
        self._requested_s, self._waited_s = 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Wait at most ``seconds``, and less at the beginning of a series."""
        if seconds != self._requested_s:
            self._requested_s, self._waited_s = seconds, 0.0
        shorter = poll_interval(self._waited_s, seconds)
        self._waited_s += shorter
        time.sleep(shorter)

    def restart(self) -> None:
        """Begin another wait with short sleeps."""
        self._waited_s = 0.0
