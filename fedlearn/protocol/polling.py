"""Compute the waits between two polls. Flower itself polls at long fixed intervals."""

from __future__ import annotations

INITIAL_BACKOFF_S = 0.05  # seconds before Flower requests missing parts of a message again; doubled at each attempt


def poll_interval(waited_s: float, max_s: float, shortest_s: float | None = None) -> float:
    """Return the time until the next poll, in seconds.

    The interval is a twentieth of the time waited so far, and at least a fifteenth of ``max_s``. So a fast response
    arrives without delay, and a slow response costs few polls (each poll costs the SuperLink ten milliseconds).

    Args:
        waited_s: time waited so far, in seconds, >= 0.
        max_s: longest interval, in seconds, > 0.
        shortest_s: shortest interval; None: a fifteenth of ``max_s``.

    >>> [poll_interval(waited, 3.0) for waited in (0, 1, 10, 60, 600)]
    [0.2, 0.2, 0.5, 3.0, 3.0]
    """
    return min(max_s, max(shortest_s or max_s / 15, waited_s / 20))
