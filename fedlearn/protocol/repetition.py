"""Decide when a request without a response is sent again. Nodes store their responses, so a repeated request is safe.

A request gets no response if its message is lost with a connection, or if the node reports an error, e.g. because its
trainer starts. Both end within seconds in most cases. The deadline of the request stays the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_ERRORS = 6  # errors of a connected node, after which its request fails
MAX_PAUSE_S = 8.0  # longest pause before a request is sent again
MIN_REMAINING_S = 1.0  # seconds before the deadline in which no request is sent again
REPORT_INTERVAL_S = 8.0  # seconds between two lines about the same request
DISCONNECTED = "the node is not connected"


@dataclass
class Waiting:
    """A request that is sent again at a time.

    Attributes:
        sent: the request, as it was sent.
        reason: reason of the last failure.
        due: time of the next attempt, on the monotonic clock.
    """

    sent: Any
    reason: str
    due: float


@dataclass
class Repetition:
    """The requests that are sent again.

    Args:
        connected_since: function that returns the start of the connection of each node as a Unix time, by Flower's id.
        report: function that shows a line about a request that is sent again.
    """

    connected_since: Callable[[], Mapping[int, float]] = dict
    report: Callable[[int, str], None] = lambda node_id, text: None
    waiting: dict[str, Waiting] = field(default_factory=dict)  # by id of the request
    _num_errors: dict[str, int] = field(default_factory=dict)
    _reported: dict[str, float] = field(default_factory=dict)

    def interrupted(self, in_flight: Mapping[str, Any]) -> list[str]:
        """Return Flower's ids of the messages whose connection to the node has started since they were sent."""
        since = self.connected_since() if in_flight else {}
        return [id for id, sent in in_flight.items() if since.get(sent.node_id, 0.0) > sent.sent_at_unix]

    def accepts(self, sent: Any, *, is_error: bool) -> bool:
        """Return whether a request that failed may be sent again.

        Args:
            sent: the request.
            is_error: True for an error that the connected node reports.
        """
        id = sent.request.id
        self._num_errors[id] = self._num_errors.get(id, 0) + is_error
        return sent.remaining_s > MIN_REMAINING_S and self._num_errors[id] < MAX_ERRORS

    def add(self, sent: Any, reason: str) -> None:
        """Send a request again after a pause, which grows with the number of errors."""
        pause = min(MAX_PAUSE_S, 0.5 * 2.0 ** self._num_errors.get(sent.request.id, 0))
        self.waiting[sent.request.id] = Waiting(sent, reason, time.monotonic() + pause)

    def take_due(self, connected: Callable[[], set[int]]) -> list[Any]:
        """Return the requests that are sent again now, and report the requests whose node is not connected.

        Args:
            connected: function that returns Flower's ids of the connected nodes.
        """
        now = time.monotonic()
        due = [waiting for waiting in self.waiting.values() if waiting.due <= now]
        node_ids = connected() if due else set()
        taken = []
        for waiting in due:
            sent = waiting.sent
            if sent.node_id in node_ids:
                del self.waiting[sent.request.id]
                taken.append(sent)
                self._report(sent, f"is asked again: {waiting.reason}")
            else:
                waiting.due, waiting.reason = now + 1.0, DISCONNECTED
                self._report(sent, f"is not connected; the round waits for it, at most {sent.remaining_s:.0f} s")
        return taken

    def take_expired(self) -> list[Waiting]:
        """Return the waiting requests whose deadline has passed."""
        expired = [waiting for waiting in self.waiting.values() if waiting.sent.remaining_s <= MIN_REMAINING_S]
        for waiting in expired:
            self.forget(waiting.sent.request.id)
        return expired

    def forget(self, id: str) -> None:
        """Forget a request that has a response, or that is cancelled."""
        self.waiting.pop(id, None)
        self._num_errors.pop(id, None)
        self._reported.pop(id, None)

    def _report(self, sent: Any, text: str) -> None:
        last, now = self._reported.get(sent.request.id), time.monotonic()
        if last is None or now - last >= REPORT_INTERVAL_S:
            self._reported[sent.request.id] = now
            self.report(sent.node_id, text)
