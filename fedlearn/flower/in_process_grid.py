"""Run an unmodified Flower ServerApp and ClientApp in this process, without network, Ray or polling.

A node handles its messages in the order in which they were sent. It starts when the response of one of them is pulled,
or when the ServerApp has ended. So memory holds few responses, and each message reaches its node. Nodes run one at a
time, or in the processes of a pool. Each side receives its own copy of the records, so that neither can change the
records of the other.
Copies share only the immutable bytes of arrays. A copy takes 15 us for arrays of any size; conversion through Protobuf,
as in Flower, takes 4 s for 100 MB.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import count
from threading import RLock
from typing import Any, Protocol, cast

from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedlearn.errors import is_count, require
from fedlearn.flower.compat.messages import (
    SERVER,
    client_app_error,
    copy_message,
    empty_run,
    identify_as_server,
    set_message_id,
    shallow_copy,
)
from fedlearn.flower.fast_array import FastArray
from fedlearn.flower.node_waits import EndlessWait, WaitDetector

FIRST_NODE_ID = SERVER + 1
# seconds of client work for one call that pulls several responses, so that a caller can check its own deadline
PULL_DURATION_S = 0.1
# error codes of Flower
UNKNOWN_ERROR, CLIENT_APP_RAISED_EXCEPTION, MESSAGE_UNAVAILABLE, RESPONSE_UNAVAILABLE = 0, 2, 3, 4
INFINITY, MAX_WAIT_S = float("inf"), 0.5
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a message that a ClientApp has handled.

    Attributes:
        response, context: the response, and the context with the new state of the node; None after an error.
        code, reason: error code of Flower, and text for the ServerApp.
        error, trace: text of the error, and its traceback.
    """

    response: Message | None = None
    context: Context | None = None
    code: int = UNKNOWN_ERROR
    reason: str = ""
    error: str = ""
    trace: str = ""


class Pool(Protocol):
    """Run a ClientApp in other processes."""

    num_workers: int

    def submit(self, message: Message, context: Context) -> Future[Outcome]:
        """Handle a message in one of the processes."""

    def result(self, future: Future[Outcome]) -> Outcome:
        """Return the outcome of a message, also if its process has ended."""


class InProcessGrid(Grid):
    """Run a ClientApp on simulated nodes.

    Args:
        client_app: the ClientApp of a Flower app.
        num_nodes: number of nodes, >= 1. A node uses no memory before its first message.
        run_config: configuration that apps read from ``context.run_config``.
        node_config: configuration of each node that apps read from ``context.node_config``, beside ``partition-id`` and
            ``num-partitions``. In texts, ``{partition}`` becomes the number of the partition.
        available_partitions: partitions whose nodes are available; None: all, 0 to ``num_nodes - 1``.
        on_endless_wait: function that is called, in any thread, if the app waits for nodes that cannot connect.
        pool: processes that run the ClientApp; None: this process.

    Attributes:
        outcomes: number of messages that ended as ``response`` or ``error``.
        first_error: first error of a ClientApp, with its traceback; empty for none.
        endless_wait: error of an app that waits for nodes that cannot connect; None for no such wait.

    *Guarantees*: each message to a node is handled once, also if its response is never pulled, unless it expires.
    ``context.state`` of a node is kept between messages. If the ClientApp raises, the state is unchanged.
    Each message has a response: from the ClientApp, or an error with the code and reason of Flower's own simulation.
    ``timeout`` and the time to live of a message bound the wait, except for a ClientApp that does not return. It cannot
    be interrupted.

    Raises:
        SettingError: ``num_nodes`` is out of range.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        node_config: Mapping[str, Any] | None = None,
        available_partitions: Sequence[int] | None = None,
        on_endless_wait: Callable[[], None] = lambda: None,
        pool: Pool | None = None,
    ) -> None:
        require(is_count(num_nodes), "num_nodes", num_nodes, "a whole number >= 1", "num_nodes=10")
        self.client_app, self.num_nodes = client_app, num_nodes
        self.run_config, self.node_config = dict(run_config or {}), dict(node_config or {})
        nodes = range(FIRST_NODE_ID, FIRST_NODE_ID + num_nodes)
        self.nodes: Sequence[int] = (
            nodes if available_partitions is None else [FIRST_NODE_ID + partition for partition in available_partitions]
        )
        self.outcomes: Counter[str] = Counter()
        self.first_error = ""
        self._run = empty_run()
        self._ids = count(1)
        self._sent: dict[str, Message] = {}  # messages whose responses were not pulled yet
        self._queues: dict[int, deque[str]] = {}  # node -> ids of messages that were not handled yet, the oldest first
        self._responses: dict[str, Message] = {}
        self._contexts: dict[int, Context] = {}
        self._pool = pool
        self._running: dict[Future[Outcome], Message] = {}  # messages that a process of the pool handles
        self._lock = RLock()
        self._on_endless_wait = on_endless_wait
        self._waits = WaitDetector(len(self.nodes))
        self.endless_wait: EndlessWait | None = None
        identify_as_server()

    def set_run(self, run: Any) -> None:
        """Set Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Any:
        """Flower's description of the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message. Flower keeps this method for older apps."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the available nodes: 2 for partition 0, 3 for partition 1, and so on.

        Raises:
            EndlessWait: the app waits for more nodes than there are.
        """
        try:
            self._waits.note_request_for_nodes()
        except EndlessWait as error:
            self.endless_wait = error
            self._on_endless_wait()
            raise
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages, and return the id of each; `pull_messages` takes these ids.

        A message to an unknown node is logged and gets no id, as in Flower's own runtimes.

        Raises:
            ValueError: a message is a response, or has no time to live.
        """
        ids = []
        self._waits.note_message()
        for message in messages:
            metadata = message.metadata
            if metadata.dst_node_id not in self.nodes:
                log.error("no node %d: the message is not sent", metadata.dst_node_id)
                continue
            if metadata.reply_to_message_id or metadata.ttl <= 0:
                raise ValueError(f"not a message to a node, expected no reply_to_message_id and a ttl > 0: {message}")
            number = str(next(self._ids))
            set_message_id(message, number)
            with self._lock:
                self._sent[number] = detached_copy(message)
                self._queues.setdefault(metadata.dst_node_id, deque()).append(number)
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the available responses, after nodes have worked for 0.1 s or one node has finished.

        Args:
            message_ids: ids from `push_messages`.
        """
        return self._pull(message_ids, end_time=time.monotonic() + PULL_DURATION_S)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their responses.

        Args:
            messages: messages to nodes.
            timeout: seconds after which the wait ends; None waits for all responses. Later responses can still be
                pulled within the time to live of their messages.
        """
        end_time = float("inf") if timeout is None else time.monotonic() + timeout
        return self._pull(self.push_messages(messages), end_time=end_time)

    def _pull(self, message_ids: Iterable[str], *, end_time: float) -> list[Message]:
        self._waits.note_message()
        responses: list[Message] = []
        num_handled, numbers = 0, list(dict.fromkeys(message_ids))
        if self._pool:
            self._handle_in_pool(self._pool, numbers, end_time)
        for number in numbers:
            while not self._pool and self._is_waiting(number) and not (num_handled and time.monotonic() >= end_time):
                num_handled += self._handle_oldest(self._sent[number].metadata.dst_node_id)
            with self._lock:
                if not self._is_waiting(number):
                    responses.append(self._take_response(number))
        return responses

    def _is_waiting(self, number: str) -> bool:
        """Return whether the node of a message has not handled it yet."""
        message = self._sent.get(number)
        is_queued = message is not None and number in self._queues.get(message.metadata.dst_node_id, ())
        return is_queued or any(message.metadata.message_id == number for message in self._running.values())

    def handle_all(self) -> None:
        """Handle the messages whose responses were not pulled. Call it when the ServerApp has ended."""
        while waiting := [node for node, queue in self._queues.items() if queue]:
            if self._pool:
                self._handle_in_pool(
                    self._pool, [number for node in waiting for number in self._queues[node]], INFINITY
                )
            else:
                self._handle_oldest(min(waiting, key=lambda node: int(self._queues[node][0])))
        if self._pool:
            self._handle_in_pool(self._pool, [m.metadata.message_id for m in self._running.values()], INFINITY)

    def _handle_oldest(self, node: int) -> bool:
        """Handle the oldest message of a node. Return whether the ClientApp ran."""
        with self._lock:
            message = self._next_message(node)
            if message is None:
                return False
            self._keep(message, call_client(self.client_app, message, self._context_of(message)))
            return True

    def _handle_in_pool(self, pool: Pool, numbers: Sequence[str], end_time: float) -> None:
        """Handle messages in the processes of the pool, after the earlier messages of their nodes.

        A node handles one message at a time, so its messages keep their order and its state.
        """
        while True:
            with self._lock:
                for future in [future for future in self._running if future.done()]:
                    self._keep(self._running.pop(future), pool.result(future))
                waiting = [number for number in numbers if self._is_waiting(number)]
                self._start(pool, [self._sent[number].metadata.dst_node_id for number in waiting])
                running = [*self._running]
                if not any(self._is_waiting(number) for number in numbers):
                    return
            remaining_s = end_time - time.monotonic()
            if remaining_s <= 0:
                return
            wait(running, timeout=min(remaining_s, MAX_WAIT_S), return_when=FIRST_COMPLETED)

    def _start(self, pool: Pool, nodes: Iterable[int]) -> None:
        """Start the oldest message of each node that is not busy, while a process is free."""
        busy = {message.metadata.dst_node_id for message in self._running.values()}
        for node in dict.fromkeys(nodes):
            while self._queues[node] and node not in busy and len(self._running) < pool.num_workers:
                if message := self._next_message(node):
                    self._running[pool.submit(message, self._context_of(message))] = message
                    busy.add(node)

    def _next_message(self, node: int) -> Message | None:
        """Take the oldest message of a node from its queue; return None if there is none, or if it has expired."""
        queue = self._queues[node]
        message = self._sent.get(queue.popleft()) if queue else None
        return None if message is None or _is_expired(message) else message

    def _context_of(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        return _copy_context(self._contexts.get(node) or self._new_context(node))

    def _keep(self, message: Message, outcome: Outcome) -> None:
        """Keep the response and the state, or the error, of a message."""
        number, node = message.metadata.message_id, message.metadata.dst_node_id
        if outcome.response is not None and outcome.context is not None:
            response, self._contexts[node] = outcome.response, outcome.context
            self.outcomes["response"] += 1
        else:
            self.first_error = self.first_error or outcome.trace
            log.error("node %d: %s", node, outcome.error)
            response = Message(Error(code=outcome.code, reason=outcome.reason), reply_to=message)
            self.outcomes["error"] += 1
        set_message_id(response, f"{number}-reply")
        self._responses[number] = response

    def _take_response(self, number: str) -> Message:
        """Return the response to a message and remove both; return an error if it expired or was pulled before."""
        message, response = self._sent.pop(number, None), self._responses.pop(number, None)
        if message is None or response is None or _is_expired(message):
            return self._error_response(
                number, message, MESSAGE_UNAVAILABLE, "the message has expired, or its response was pulled before"
            )
        if _is_expired(response):
            return self._error_response(number, message, RESPONSE_UNAVAILABLE, "the response has expired")
        return response

    def _error_response(self, number: str, message: Message | None, code: int, reason: str) -> Message:
        self.outcomes["error"] += 1
        request = message or Message(RecordDict(), SERVER, "query")
        set_message_id(request, number)
        return Message(Error(code=code, reason=reason), reply_to=request)

    def _new_context(self, node: int) -> Context:
        return Context(
            run_id=self._run.run_id,
            node_id=node,
            node_config=self._node_config(node - FIRST_NODE_ID),
            state=RecordDict(),
            run_config=dict(self.run_config),
        )

    def _node_config(self, partition: int) -> dict[str, Any]:
        """Return the configuration of a node."""
        chosen = {
            name: value.replace("{partition}", str(partition)) if isinstance(value, str) else value
            for name, value in self.node_config.items()
        }
        return {"partition-id": partition, "num-partitions": self.num_nodes, **chosen}


def detached_copy(message: Message) -> Message:
    """Return a copy of a message. The copy shares no mutable object with it."""
    copied: Message = copy_message(message)
    if copied.has_content():
        copied.content = copy_records(message.content)
    return copied


def copy_records(records: RecordDict) -> RecordDict:
    """Return a copy of records. The copy shares no mutable object with them."""
    copies = records.copy()
    for key, record in records.items():
        copies[key] = copied = cast(Any, record.copy())
        for name, value in record.items():
            if isinstance(value, Array):
                copied[name] = shallow_copy(value, FastArray)
            elif isinstance(value, list):
                copied[name] = list(value)
    return copies


def _copy_context(context: Context) -> Context:
    return Context(
        run_id=context.run_id,
        node_id=context.node_id,
        node_config=dict(context.node_config),
        state=copy_records(context.state),
        run_config=dict(context.run_config),
    )


def call_client(client_app: ClientApp, message: Message, context: Context) -> Outcome:
    """Run a ClientApp for a message. An exit of the ClientApp ends this message only."""
    run_config = dict(context.run_config)
    try:
        response = _call_client_app(client_app, message, context)
        if context.run_config != run_config:
            raise ValueError("the ClientApp changed context.run_config, expected no change")
    except (Exception, SystemExit) as error:
        code = CLIENT_APP_RAISED_EXCEPTION if isinstance(error, client_app_error()) else UNKNOWN_ERROR
        reason = f"{type(error)}:<'{error}'>"
        return Outcome(code=code, reason=reason, error=str(error), trace=traceback.format_exc())
    return Outcome(response=response, context=context)


def _call_client_app(client_app: ClientApp, message: Message, context: Context) -> Message:
    """Return the response of the ClientApp; report its exceptions as Flower's simulation does."""
    try:
        response = client_app(message=message, context=context)
    except (Exception, SystemExit) as error:
        raise client_app_error()(str(error)) from error
    if not isinstance(response, Message):
        raise client_app_error()(f"the ClientApp returned {type(response).__name__}, expected a Message")
    return detached_copy(response)


def _is_expired(message: Message) -> bool:
    return message.metadata.created_at + message.metadata.ttl < time.time()
