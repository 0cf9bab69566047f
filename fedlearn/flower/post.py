"""Requests and answers over a Flower `Grid`: waits that end, and answers nobody waits for any more, counted.

Flower's own ``send_and_receive`` sleeps three seconds between looks and says nothing of what did not come.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedlearn.errors import FedlearnError
from fedlearn.flower.compat import retry_parts_after, run_stopped_error, upload_error
from fedlearn.flower.envelope import disclose, enclose_each
from fedlearn.flower.pace import FIRST_LOOK, pause

LONGEST = 3.0  # seconds between two looks
MOST_REMEMBERED = 10_000  # messages whose answers may still come late, or twice
TRIES = 3  # to upload a message whose link goes down meanwhile
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of a request to a node.

    Attributes:
        node: Flower's id of it.
        message: the request that it answers.
        payload: the answer's bytes; None if there is none.
        reason: why there is none.
    """

    node: int
    message: str = ""
    payload: bytes | None = None
    reason: str = ""


class Post:
    """Sends requests to nodes and brings their answers.

    Attributes:
        ignored: how many answers were not taken, by cause: ``late``, ``duplicate``, ``stranger``.
    """

    def __init__(self, grid: Grid) -> None:
        retry_parts_after(FIRST_LOOK)
        self.grid = grid
        self.ignored: Counter[str] = Counter()
        self._late: dict[str, int] = {}  # message -> node; asked for, given up
        self._answered: deque[str] = deque(maxlen=MOST_REMEMBERED)

    def nodes(self) -> set[int]:
        """Flower's ids of the nodes that are connected."""
        with _interruptible():
            return set(self.grid.get_node_ids())

    def exchange(
        self, requests: Mapping[int, bytes], body: bytes = b"", *, round: int, seconds: float
    ) -> Generator[Answer]:
        """One answer for each node, in order of arrival; after ``seconds`` those that did not come, with the reason.

        Whoever stops listening gives the other nodes up: their answers are late then.

        Args:
            requests: what each node is asked.
            body: what follows each request, the same for all.
            round: for Flower's own log.
            seconds: until answers must be there.
        """
        began = time.monotonic()
        waiting = self.send(requests, body, round=round, seconds=seconds)
        untaken = requests.keys() - waiting.values()
        yield from (Answer(node=node, reason="Flower did not take the message") for node in untaken)
        try:
            while waiting:
                yield from self.poll(waiting)
                waited = time.monotonic() - began
                if not waiting or waited >= seconds:
                    break
                time.sleep(min(pause(waited, LONGEST), seconds - waited))
            for message in list(waiting):
                self._late[message] = waiting.pop(message)
                yield Answer(node=self._late[message], reason=f"no answer within {seconds:g} s")
        finally:
            self.give_up(waiting)

    def give_up(self, waiting: Mapping[str, int]) -> None:
        """Wait no more for these messages: their answers are late from now on."""
        self._late |= waiting
        for message in list(self._late)[:-MOST_REMEMBERED]:
            del self._late[message]

    def send(self, requests: Mapping[int, bytes], body: bytes = b"", *, round: int, seconds: float) -> dict[str, int]:
        """Push requests; the messages that Flower took, with their nodes."""
        if not requests:
            return {}
        for _ in range(TRIES):
            messages = [
                Message(content, node, "query", ttl=seconds, group_id=str(round))
                for node, content in zip(requests, enclose_each(list(requests.values()), body), strict=True)
            ]
            try:
                with _interruptible():
                    taken = list(self.grid.push_messages(messages))
            except upload_error() as error:  # the SuperLink died between announcement and upload, and came back
                log.warning("sending again: %s", error)
                continue
            if len(taken) != len(messages):
                raise FedlearnError("Flower took none of the messages: they are too large, or its SuperLink has gone")
            return {message: node for message, node in zip(taken, requests, strict=True) if message}
        return {}

    def poll(self, waiting: dict[str, int]) -> list[Answer]:
        """The answers that have come, without waiting; they are taken off ``waiting``."""
        answers = []
        with _interruptible():
            replies = list(self.grid.pull_messages([*waiting, *self._late]))
        for reply in replies:
            message, sender = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
            node = waiting.get(message)
            if node is None:
                self._ignore(message, sender)
            elif reply.has_error():
                del waiting[message]
                self._answered.append(message)
                answers.append(Answer(node=node, message=message, reason=_in_one_line(reply.error.reason)))
            elif sender != node:
                self._count("stranger", sender)
            else:
                del waiting[message]
                self._answered.append(message)
                answers.append(_opened(node, message, reply))
        return answers

    def _ignore(self, message: str, sender: int) -> None:
        if message in self._late:
            del self._late[message]
            self._answered.append(message)
            self._count("late", sender)
        else:
            self._count("duplicate" if message in self._answered else "stranger", sender)

    def _count(self, cause: str, sender: int) -> None:
        self.ignored[cause] += 1
        log.warning("ignored an answer of node %d: %s", sender, cause)


@contextmanager
def _interruptible() -> Iterator[None]:
    """``flwr stop`` means to a deployed run what Ctrl-C means to a simulation."""
    try:
        yield
    except run_stopped_error():
        raise KeyboardInterrupt("the run was stopped") from None


def _opened(node: int, message: str, reply: Message) -> Answer:
    try:
        return Answer(node=node, message=message, payload=disclose(reply.content))
    except ValueError as error:
        return Answer(node=node, message=message, reason=str(error))


def _in_one_line(reason: str | None) -> str:
    return " ".join((reason or "Flower reports an error without a reason").split())[:2000]
