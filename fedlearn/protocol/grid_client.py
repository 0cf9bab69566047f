"""Bytes in Flower's records: the one place where a parcel meets a `RecordDict`.

A small parcel is a value in a config record: each further record of a message costs a request at each station. A large
one is an array, which Flower cuts into objects of 5 MB on its way, so that no message has to fit the 2 GiB of one
protobuf.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlearn.errors import FedlearnError
from fedlearn.flower.compat import retry_parts_after, run_stopped_error, upload_error
from fedlearn.protocol.polling import INITIAL_BACKOFF_S, poll_interval

RECORD, SHARED, PAYLOAD = "fedlearn", "fedlearn.shared", "payload"
STYPE = "fedlearn.safetensors"
MAX_INLINE_BYTES = 2**20  # bytes


def to_record_dict(payload: bytes) -> RecordDict:
    """A parcel as records."""
    (content,) = to_record_dicts([payload])
    return content


def to_record_dicts(payloads: Sequence[bytes], body: bytes = b"") -> list[RecordDict]:
    """Parcels for several receivers, each followed by the same body, of which Flower keeps and sends one copy."""
    if len(body) <= MAX_INLINE_BYTES:
        return [RecordDict({RECORD: _record(payload + body)}) for payload in payloads]
    shared = ArrayRecord({PAYLOAD: _array(body)})
    return [RecordDict({RECORD: _record(payload), SHARED: shared}) for payload in payloads]


def from_record_dict(content: RecordDict) -> bytes:
    """The parcel in records, with the body that follows it.

    Raises:
        ValueError: there is none.
    """
    parts = [_bytes(content.get(name)) for name in (RECORD, SHARED) if name in content]
    if not parts or None in parts:
        raise ValueError(f"the message holds {sorted(content)}, expected a parcel of fedlearn")
    return b"".join(part for part in parts if part is not None)


def _record(payload: bytes) -> ConfigRecord | ArrayRecord:
    return (
        ConfigRecord({PAYLOAD: payload})
        if len(payload) <= MAX_INLINE_BYTES
        else ArrayRecord({PAYLOAD: _array(payload)})
    )


def _array(payload: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)


def _bytes(record: object) -> bytes | None:
    found = record.get(PAYLOAD) if isinstance(record, ConfigRecord | ArrayRecord) else None
    if isinstance(found, Array) and found.stype == STYPE:
        return bytes(found.data)
    return found if isinstance(found, bytes) else None


MAX_POLL_INTERVAL_S = 3.0  # seconds between two looks
MAX_TRACKED_MESSAGES = 10_000  # messages whose answers may still come late, or twice
MAX_SEND_ATTEMPTS = 3  # to upload a message whose link goes down meanwhile
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseMessage:
    """What came of a request to a node.

    Attributes:
        node_id: Flower's id of it.
        message_id: the request that it answers.
        payload: the answer's bytes; None if there is none.
        reason: why there is none.
    """

    node_id: int
    message_id: str = ""
    payload: bytes | None = None
    reason: str = ""


class GridClient:
    """Sends requests to nodes and brings their answers.

    Attributes:
        num_ignored: how many answers were not taken, by cause: ``late``, ``duplicate``, ``stranger``.
    """

    def __init__(self, grid: Grid) -> None:
        retry_parts_after(INITIAL_BACKOFF_S)
        self.grid = grid
        self.num_ignored: Counter[str] = Counter()
        self._late: dict[str, int] = {}  # message -> node; asked for, given up
        self._answered: deque[str] = deque(maxlen=MAX_TRACKED_MESSAGES)

    def node_ids(self) -> set[int]:
        """Flower's ids of the nodes that are connected."""
        with _interruptible():
            return set(self.grid.get_node_ids())

    def exchange(
        self, requests: Mapping[int, bytes], body: bytes = b"", *, round: int, timeout_s: float
    ) -> Generator[ResponseMessage]:
        """One answer for each node, in order of arrival; after ``timeout_s`` those that did not come, with the reason.

        Whoever stops listening gives the other nodes up: their answers are late then.

        Args:
            requests: what each node is asked.
            body: what follows each request, the same for all.
            round: for Flower's own log.
            timeout_s: until answers must be there.
        """
        began = time.monotonic()
        waiting = self.send(requests, body, round=round, timeout_s=timeout_s)
        untaken = requests.keys() - waiting.values()
        yield from (ResponseMessage(node_id=node, reason="Flower did not take the message") for node in untaken)
        try:
            while waiting:
                yield from self.poll(waiting)
                waited = time.monotonic() - began
                if not waiting or waited >= timeout_s:
                    break
                time.sleep(min(poll_interval(waited, MAX_POLL_INTERVAL_S), timeout_s - waited))
            for message in list(waiting):
                self._late[message] = waiting.pop(message)
                yield ResponseMessage(node_id=self._late[message], reason=f"no answer within {timeout_s:g} s")
        finally:
            self.cancel(waiting)

    def cancel(self, waiting: Mapping[str, int]) -> None:
        """Wait no more for these messages: their answers are late from now on."""
        self._late |= waiting
        for message in list(self._late)[:-MAX_TRACKED_MESSAGES]:
            del self._late[message]

    def send(self, requests: Mapping[int, bytes], body: bytes = b"", *, round: int, timeout_s: float) -> dict[str, int]:
        """Push requests; the messages that Flower took, with their nodes."""
        if not requests:
            return {}
        for _ in range(MAX_SEND_ATTEMPTS):
            messages = [
                Message(content, node, "query", ttl=timeout_s, group_id=str(round))
                for node, content in zip(requests, to_record_dicts(list(requests.values()), body), strict=True)
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

    def poll(self, waiting: dict[str, int]) -> list[ResponseMessage]:
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
                answers.append(
                    ResponseMessage(node_id=node, message_id=message, reason=_in_one_line(reply.error.reason))
                )
            elif sender != node:
                self._count("unknown_sender", sender)
            else:
                del waiting[message]
                self._answered.append(message)
                answers.append(_opened(node, message, reply))
        return answers

    def _ignore(self, message: str, sender: int) -> None:
        if message in self._late:
            del self._late[message]
            self._answered.append(message)
            self._count("expired", sender)
        else:
            self._count("duplicate" if message in self._answered else "unknown_sender", sender)

    def _count(self, cause: str, sender: int) -> None:
        self.num_ignored[cause] += 1
        log.warning("ignored an answer of node %d: %s", sender, cause)


@contextmanager
def _interruptible() -> Iterator[None]:
    """``flwr stop`` means to a deployed run what Ctrl-C means to a simulation."""
    try:
        yield
    except run_stopped_error():
        raise KeyboardInterrupt("the run was stopped") from None


def _opened(node: int, message: str, reply: Message) -> ResponseMessage:
    try:
        return ResponseMessage(node_id=node, message_id=message, payload=from_record_dict(reply.content))
    except ValueError as error:
        return ResponseMessage(node_id=node, message_id=message, reason=str(error))


def _in_one_line(reason: str | None) -> str:
    return " ".join((reason or "Flower reports an error without a reason").split())[:2000]
