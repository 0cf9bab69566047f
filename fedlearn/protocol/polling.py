"""Shorter waits for Flower: it polls at fixed, long intervals, and looks for a message's parts before they are there.

Only the time that Flower sleeps is changed; `fedlearn.flower.compat` puts these waits in place.
"""

from __future__ import annotations

import time
from typing import Any

INITIAL_BACKOFF_S = (
    0.05  # seconds until parts of a message that were not there are looked for again; twice that, and so on
)


def poll_interval(waited_s: float, max_s: float) -> float:
    """Seconds until the next look, after ``waited_s`` seconds, where Flower would take ``max_s``.

    A twentieth of the time waited, but a fifteenth of ``max_s`` at least: what comes soon is found soon, what takes
    long costs few looks (each costs the SuperLink ten milliseconds), and no wait is much longer than it must be.

    >>> [poll_interval(waited, 3.0) for waited in (0, 1, 10, 60, 600)]
    [0.2, 0.2, 0.5, 3.0, 3.0]
    """
    return min(max_s, max(max_s / 15, waited_s / 20))


class PollingClock:
    """Python's ``time``, with pauses instead of sleeps, each at most as long as the sleep that was asked for.

    A wait is a series of sleeps of equal length; another length begins another wait.
    """

    def __init__(self) -> None:
        self._asked, self._waited = 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """At most ``seconds``."""
        if seconds != self._asked:
            self._asked, self._waited = seconds, 0.0
        shorter = poll_interval(self._waited, seconds)
        self._waited += shorter
        time.sleep(shorter)

    def restart(self) -> None:
        """Another wait begins."""
        self._waited = 0.0
