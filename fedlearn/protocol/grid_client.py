"""Send requests through Flower's `Grid` and receive the responses. Only here a message is a `RecordDict`.

A small message is a value in a config record, because each further record costs an HTTP request at each process. A
large part is an array. Flower divides it into objects of 5 MB, so no message has to fit into one protobuf of 2 GiB.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlearn.core.records import FailureStage
from fedlearn.core.serialization import WireError, pack_parts, read_text
from fedlearn.core.tensor_bytes import Buffer, join, num_bytes
from fedlearn.errors import FedlearnError
from fedlearn.flower.compat.messages import run_stopped_error, upload_error
from fedlearn.flower.compat.parts import PartsArray, parts_of, record_of
from fedlearn.flower.compat.transfers import receive_on_disk, retry_parts_after
from fedlearn.protocol.messages import MAX_REQUEST_BYTES, NodeRequest, NodeResponse
from fedlearn.protocol.polling import INITIAL_BACKOFF_S, poll_interval
from fedlearn.protocol.refusals import RefusalCode
from fedlearn.protocol.repetition import Repetition
from fedlearn.protocol.sites import STRANGER

RECORD, SHARED, PAYLOAD = "fedlearn", "fedlearn.shared", "payload"
STYPE = "fedlearn.safetensors"
MAX_INLINE_BYTES = 2**20  # bytes of a shared part that stays in the config record
MAX_POLL_INTERVAL_S = 3.0  # seconds between two polls
MAX_TRACKED_MESSAGES = 10_000  # messages that may still get a late or second response
NODE_UNAVAILABLE = 5  # Flower's code of an error for a node that is not connected
STALL_S = 15.0  # seconds without a part of an announced response, after which its request is sent again
MAX_SEND_ATTEMPTS = 3  # attempts to upload messages while the SuperLink restarts
log = logging.getLogger(__name__)


def to_record_dict(data: Buffer | Sequence[Buffer]) -> RecordDict:
    """Return a message, which may be in parts, as records of Flower."""
    (content,) = to_record_dicts([[data] if isinstance(data, Buffer) else data])
    return content


def to_record_dicts(heads: Sequence[Sequence[Buffer]], shared: Sequence[Buffer] = ()) -> list[RecordDict]:
    """Return messages for several nodes as records. Flower stores one copy of their shared part.

    Args:
        heads: first part of the message to each node, in parts.
        shared: second part, equal for all nodes, in parts.
    """
    if num_bytes(shared) <= MAX_INLINE_BYTES:
        return [RecordDict({RECORD: _record([*head, *shared])}) for head in heads]
    record = record_of({PAYLOAD: PartsArray(shared, STYPE)})
    return [RecordDict({RECORD: _record(head), SHARED: record}) for head in heads]


def from_record_dict(content: RecordDict) -> bytes:
    """Return the message in records of Flower.

    Raises:
        ValueError: The records have no message of fedlearn.
    """
    return b"".join(parts_from_record_dict(content))


def parts_from_record_dict(content: RecordDict) -> list[Buffer]:
    """Return the message in records of Flower in parts, without a copy.

    Raises:
        ValueError: The records have no message of fedlearn.
    """
    parts = [_parts(content.get(name)) for name in (RECORD, SHARED) if name in content]
    if not parts or None in parts:
        raise ValueError(f"the records are {sorted(content)}, expected a message of fedlearn")
    return [part for of_record in parts for part in of_record or ()]


def _record(parts: Sequence[Buffer]) -> ConfigRecord | ArrayRecord:
    if num_bytes(parts) <= MAX_INLINE_BYTES:
        return ConfigRecord({PAYLOAD: b"".join(parts)})
    return record_of({PAYLOAD: PartsArray(parts, STYPE)})


def _parts(record: object) -> list[Buffer] | None:
    value = record.get(PAYLOAD) if isinstance(record, ConfigRecord | ArrayRecord) else None
    if isinstance(value, Array) and value.stype == STYPE:
        return parts_of(value)
    return [value] if isinstance(value, bytes) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlightRequest:
    """A request that was sent to a node and has no response yet.

    Attributes:
        node_id: Flower's id of the node.
        request: the sent request.
        timeout_s: seconds after which the request counts as failed, > 0.
        max_response_bytes: size limit of the response, in bytes.
        sent_at: time of the first attempt, on the monotonic clock.
        sent_at_unix: time of the last attempt, as a Unix time.
    """

    node_id: int
    request: NodeRequest
    timeout_s: float
    max_response_bytes: int
    sent_at: float = field(default_factory=time.monotonic)
    sent_at_unix: float = field(default_factory=time.time)

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, negative after it."""
        return self.sent_at + self.timeout_s - time.monotonic()


class GridClient:
    """Send requests to nodes and collect the responses. Each request gets exactly one response.

    A request is sent again until its deadline if Flower reports an error, or if the node has connected anew. A request
    without a response gets a refusal at stage ``node``. A response that cannot be read becomes a refusal at stage
    ``response``.

    Args:
        grid: Flower's connection to the nodes.
        name_of: function from Flower's id of a node to its name in messages.
        repetition: the requests that are sent again.
        folder: folder on a disk for large responses; None: the system's folder for temporary files.

    Attributes:
        num_ignored: number of responses that were ignored, by cause: ``expired``, ``duplicate``, ``unknown_sender``,
            ``malformed``.
    """

    def __init__(
        self,
        grid: Grid,
        name_of: Callable[[int], str] = lambda node_id: STRANGER,
        repetition: Repetition | None = None,
        *,
        folder: Path | None = None,
    ) -> None:
        retry_parts_after(INITIAL_BACKOFF_S)
        receive_on_disk(STALL_S, folder=folder, max_bytes=MAX_REQUEST_BYTES)
        self.grid, self._name_of, self.repetition = grid, name_of, repetition or Repetition()
        self.num_ignored: Counter[str] = Counter()
        self._in_flight: dict[str, InFlightRequest] = {}  # by Flower's id of the message
        self._completed: dict[str, NodeResponse] = {}  # by id of the request
        self._expired: dict[str, None] = {}  # Flower's ids of messages without a response in time, in order
        self._answered: deque[str] = deque(maxlen=MAX_TRACKED_MESSAGES)

    def node_ids(self) -> set[int]:
        """Return Flower's ids of the connected nodes."""
        with _interruptible():
            return set(self.grid.get_node_ids())

    def is_busy(self, node_id: int) -> bool:
        """Return whether the node has an unanswered request. A node works on one request at a time."""
        return any(sent.node_id == node_id for sent in self._unanswered())

    def send(self, requests: Sequence[InFlightRequest]) -> None:
        """Send requests with the same shared content. A request that Flower refuses completes with a refusal.

        Raises:
            FedlearnError: Flower accepts no request, because they are too large or the SuperLink is down.
        """
        message_ids = self._push(requests) if requests else []
        for sent, message_id in zip(requests, message_ids, strict=True):
            if message_id:
                self._in_flight[message_id] = sent
            else:
                self._refuse(sent, FailureStage.NODE, "Flower did not accept the message")

    def take(self, ids: Collection[str]) -> list[NodeResponse]:
        """Return the available responses to these requests; do not wait."""
        self._poll()
        return [self._completed.pop(id) for id in list(self._completed) if id in ids]

    def wait(self, ids: Collection[str]) -> NodeResponse:
        """Wait until one of these requests completes, and return its response.

        Raises:
            RuntimeError: None of these requests is in flight.
        """
        start = time.monotonic()
        while True:
            for id in (id for id in self._completed if id in ids):
                return self._completed.pop(id)
            if not self._poll():
                remaining = [sent.remaining_s for sent in self._unanswered() if sent.request.id in ids]
                if not remaining:
                    raise RuntimeError("no request is in flight")
                pause = poll_interval(time.monotonic() - start, MAX_POLL_INTERVAL_S)
                time.sleep(max(0.0, min(pause, *remaining)))

    def cancel(self, ids: Collection[str]) -> None:
        """Cancel these requests. Later responses to them count as expired."""
        for message_id in [message_id for message_id, sent in self._in_flight.items() if sent.request.id in ids]:
            self._expire(message_id)
        for id in ids:
            self._completed.pop(id, None)
            self.repetition.forget(id)

    def _push(self, requests: Sequence[InFlightRequest]) -> Sequence[str | None]:
        shared = pack_parts(requests[0].request.shared)
        heads = [sent.request.pack_head() for sent in requests]
        message_ids: list[str | None] | None = None
        for _ in range(MAX_SEND_ATTEMPTS):
            messages = [
                Message(content, sent.node_id, "query", ttl=sent.remaining_s, group_id=str(sent.request.round))
                for sent, content in zip(requests, to_record_dicts(heads, shared), strict=True)
            ]
            try:
                with _interruptible():
                    message_ids = list(self.grid.push_messages(messages))
            except upload_error() as error:  # the SuperLink restarted between announcement and upload
                log.warning("sending the messages again: %s", error)
                continue
            if len(message_ids) == len(messages):
                return message_ids
            log.warning("Flower accepted no message")
            time.sleep(1.0)  # the SuperLink may be restarting
        if message_ids is None:
            return [None] * len(requests)
        raise FedlearnError("Flower accepted no message: the messages are too large, or the SuperLink is down")

    def _poll(self) -> int:
        """Collect available responses, send requests again, and refuse requests after their deadline.

        Returns:
            The number of completions.
        """
        num_before = len(self._completed)
        with _interruptible():
            arrived = list(self.grid.pull_messages([*self._in_flight, *self._expired]))
        for message in arrived:
            message_id, sender = message.metadata.reply_to_message_id, message.metadata.src_node_id
            sent = self._in_flight.get(message_id)
            if sent is None:
                self._ignore(message_id, sender)
            elif sender != sent.node_id and not message.has_error():
                self._count("unknown_sender", sender)
            else:
                self._answered.append(message_id)
                self._complete(self._in_flight.pop(message_id), message)
        for message_id in self.repetition.interrupted(self._in_flight):
            lost = self._in_flight[message_id]
            self._expire(message_id)
            self._fail(lost, "it has connected anew", is_error=False)
        for message_id, sent in list(self._in_flight.items()):
            if sent.remaining_s <= 0:
                self._expire(message_id)
                self._refuse(sent, FailureStage.NODE, f"no response within {sent.timeout_s:g} s")
        for waiting in self.repetition.take_expired():
            text = f"no response within {waiting.sent.timeout_s:g} s: {waiting.reason}"
            self._refuse(waiting.sent, FailureStage.NODE, text)
        for due in self.repetition.take_due(self.node_ids):
            self.send([replace(due, sent_at_unix=time.time())])
        return len(self._completed) - num_before

    def _complete(self, sent: InFlightRequest, message: Message) -> None:
        if message.has_error():
            if message.error.code == NODE_UNAVAILABLE:
                return self._fail(sent, "it was not connected", is_error=False)
            reason = read_text(message.error.reason or "", "reason", max_length=2000)
            return self._fail(sent, reason or "Flower reports an error without a reason", is_error=True)
        try:
            data = join(parts_from_record_dict(message.content))
            response = NodeResponse.unpack(data, sent.request, max_bytes=sent.max_response_bytes)
            if response.refusal and response.refusal.code == RefusalCode.BUSY:
                return self._fail(sent, response.refusal.reason, is_error=True)
            self.repetition.forget(sent.request.id)
            self._completed[sent.request.id] = response
        except (WireError, ValueError) as error:
            self._count("malformed", sent.node_id)
            self._refuse(sent, FailureStage.RESPONSE, str(error))

    def _fail(self, sent: InFlightRequest, reason: str, *, is_error: bool) -> None:
        """Send a request again later, or refuse it."""
        if self.repetition.accepts(sent, is_error=is_error):
            self.repetition.add(sent, reason)
        else:
            self._refuse(sent, FailureStage.NODE, reason)

    def _unanswered(self) -> list[InFlightRequest]:
        return [*self._in_flight.values(), *(waiting.sent for waiting in self.repetition.waiting.values())]

    def _refuse(self, sent: InFlightRequest, stage: FailureStage, reason: str) -> None:
        self.repetition.forget(sent.request.id)
        self._completed[sent.request.id] = NodeResponse.missing(sent.request, stage, reason)

    def _expire(self, message_id: str) -> None:
        del self._in_flight[message_id]
        self._expired[message_id] = None
        for oldest in list(self._expired)[:-MAX_TRACKED_MESSAGES]:
            del self._expired[oldest]

    def _ignore(self, message_id: str, sender: int) -> None:
        if message_id in self._expired:
            del self._expired[message_id]
            self._answered.append(message_id)
            self._count("expired", sender)
        else:
            self._count("duplicate" if message_id in self._answered else "unknown_sender", sender)

    def _count(self, cause: str, sender: int) -> None:
        self.num_ignored[cause] += 1
        log.warning("ignored a response of %s: %s", self._name_of(sender), cause)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise `KeyboardInterrupt` for ``flwr stop``, so that it stops a deployed run as Ctrl-C stops a simulation."""
    try:
        yield
    except run_stopped_error():
        raise KeyboardInterrupt("the run was stopped") from None
