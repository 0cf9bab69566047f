"""Orders to single clients that are under way over a `GridClient`, while the server does other things."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from fedlearn.core.records import ClientId
from fedlearn.protocol.grid_client import MAX_POLL_INTERVAL_S, GridClient, ResponseMessage
from fedlearn.protocol.polling import poll_interval
from fedlearn.protocol.requests import RequestHeader

RequestKey = tuple[ClientId, int]  # of an order: whose, and of which round


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sent:
    name: RequestKey
    ask: RequestHeader
    node: int
    until: float


class InFlightRequests:
    """Which orders are out, and what has come of them.

    Args:
        grid_client: the way to nodes.
        timeout_s: for each order to be answered; the wait for it ends by then.
    """

    def __init__(self, grid_client: GridClient, *, timeout_s: float) -> None:
        self.grid_client, self.timeout_s = grid_client, timeout_s
        self._out: dict[str, _Sent] = {}
        self._back: deque[tuple[_Sent, ResponseMessage]] = deque()

    def __contains__(self, key: RequestKey) -> bool:
        return any(one.name == key for one in [*self._out.values(), *(one for one, _ in self._back)])

    def is_busy(self, node_id: int) -> bool:
        """Whether a node is at work on one: it does one thing after another."""
        return any(one.node == node_id for one in self._out.values())

    def cancel_except(self, keys: Collection[RequestKey]) -> None:
        """Give up all others."""
        self.grid_client.cancel({message: one.node for message, one in self._out.items() if one.name not in keys})
        self._out = {message: one for message, one in self._out.items() if one.name in keys}
        self._back = deque(pair for pair in self._back if pair[0].name in keys)

    def send(self, key: RequestKey, header: RequestHeader, node_id: int, request: bytes, body: bytes) -> bool:
        """Send one out; whether Flower took it."""
        until = time.monotonic() + self.timeout_s
        taken = self.grid_client.send({node_id: request}, body, round=header.round, timeout_s=self.timeout_s)
        self._out |= {message: _Sent(name=key, ask=header, node=node_id, until=until) for message in taken}
        return bool(taken)

    def wait_for_next(self) -> tuple[RequestKey, RequestHeader, ResponseMessage]:
        """Wait for the next answer, or for the time of an order to be over; there must be one that is out."""
        began = time.monotonic()
        while not self._back:
            waiting = {message: one.node for message, one in self._out.items()}
            for answer in self.grid_client.poll(waiting):
                self._back.append((self._out.pop(answer.message_id), answer))
            self._give_up_late()
            if not self._back:
                time.sleep(poll_interval(time.monotonic() - began, MAX_POLL_INTERVAL_S))
        one, answer = self._back.popleft()
        return one.name, one.ask, answer

    def _give_up_late(self) -> None:
        for message, one in list(self._out.items()):
            if time.monotonic() >= one.until:
                self.grid_client.cancel({message: self._out.pop(message).node})
                reason = f"no answer within {self.timeout_s:g} s"
                self._back.append((one, ResponseMessage(node_id=one.node, message_id=message, reason=reason)))
