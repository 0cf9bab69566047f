"""Orders to single clients that are under way over a `Post`, while the server does other things."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from fedlearn.flower.pace import pause
from fedlearn.flower.post import LONGEST, Answer, Post
from fedlearn.flower.wire import Ask
from fedlearn.records import ClientId

Name = tuple[ClientId, int]  # of an order: whose, and of which round


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sent:
    name: Name
    ask: Ask
    node: int
    until: float


class Aloft:
    """Which orders are out, and what has come of them.

    Args:
        post: the way to nodes.
        seconds: for each order to be answered; the wait for it ends by then.
    """

    def __init__(self, post: Post, *, seconds: float) -> None:
        self.post, self.seconds = post, seconds
        self._out: dict[str, _Sent] = {}
        self._back: deque[tuple[_Sent, Answer]] = deque()

    def __contains__(self, name: Name) -> bool:
        return any(one.name == name for one in [*self._out.values(), *(one for one, _ in self._back)])

    def busy(self, node: int) -> bool:
        """Whether a node is at work on one: it does one thing after another."""
        return any(one.node == node for one in self._out.values())

    def keep(self, names: Collection[Name]) -> None:
        """Give up all others."""
        self.post.give_up({message: one.node for message, one in self._out.items() if one.name not in names})
        self._out = {message: one for message, one in self._out.items() if one.name in names}
        self._back = deque(pair for pair in self._back if pair[0].name in names)

    def send(self, name: Name, ask: Ask, node: int, request: bytes, body: bytes) -> bool:
        """Send one out; whether Flower took it."""
        until = time.monotonic() + self.seconds
        taken = self.post.send({node: request}, body, round=ask.round, seconds=self.seconds)
        self._out |= {message: _Sent(name=name, ask=ask, node=node, until=until) for message in taken}
        return bool(taken)

    def next(self) -> tuple[Name, Ask, Answer]:
        """Wait for the next answer, or for the time of an order to be over; there must be one that is out."""
        began = time.monotonic()
        while not self._back:
            waiting = {message: one.node for message, one in self._out.items()}
            for answer in self.post.poll(waiting):
                self._back.append((self._out.pop(answer.message), answer))
            self._give_up_late()
            if not self._back:
                time.sleep(pause(time.monotonic() - began, LONGEST))
        one, answer = self._back.popleft()
        return one.name, one.ask, answer

    def _give_up_late(self) -> None:
        for message, one in list(self._out.items()):
            if time.monotonic() >= one.until:
                self.post.give_up({message: self._out.pop(message).node})
                reason = f"no answer within {self.seconds:g} s"
                self._back.append((one, Answer(node=one.node, message=message, reason=reason)))
