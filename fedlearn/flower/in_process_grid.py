"""A Flower `Grid` in this process: an unmodified ServerApp and ClientApp run with no network, no Ray, no waiting.

A message is handled when its reply is asked for: nodes take turns, in the order in which they were written to. Whoever
sends a message or replies keeps nothing of it: the other side gets records of its own. Only the bytes of arrays are
shared, which nobody can change (copying a message takes 15 us however large its arrays are; through Protobuf, as
Flower's records travel, 100 MB take 4 s).
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from threading import RLock
from typing import Any, cast

from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedlearn.errors import is_count, require
from fedlearn.flower.compat import (
    SERVER,
    client_app_error,
    copy_message,
    empty_run,
    identify_as_server,
    set_message_id,
    shallow_copy,
)
from fedlearn.flower.fast_array import FastArray

FIRST_NODE_ID = SERVER + 1
PULL_DURATION_S = (
    0.1  # of clients' work, if several replies are pulled at once: a caller looks at its own clock between
)
UNKNOWN_ERROR, CLIENT_APP_RAISED_EXCEPTION, MESSAGE_UNAVAILABLE, RESPONSE_UNAVAILABLE = (
    0,
    2,
    3,
    4,
)  # Flower's codes of errors
log = logging.getLogger(__name__)


class InProcessGrid(Grid):
    """Runs a ClientApp on nodes that exist in name only.

    Args:
        client_app: Flower's.
        num_nodes: >= 1; a node costs nothing until it is written to.
        run_config: what apps find in ``context.run_config``.
        available_partitions: partitions whose nodes are there; None: all, 0 to ``num_nodes - 1``.

    Attributes:
        outcomes: how many messages ended as ``response`` or ``error``.
        first_error: of a ClientApp, with its traceback; empty if there was none.

    *Guarantees*: a node's ``context.state`` is kept from message to message, and stays as it was where the ClientApp
    raises. Every message is answered: by the ClientApp, or by an error with the code and reason that Flower's own
    simulation gives. Waiting is bounded by ``timeout`` and by the messages' time to live, but for a ClientApp that does
    not return: it cannot be interrupted.

    Raises:
        SettingError: ``num_nodes`` is out of range.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        available_partitions: Sequence[int] | None = None,
    ) -> None:
        require(is_count(num_nodes), "num_nodes", num_nodes, "a whole number >= 1", "num_nodes=10")
        self.client_app, self.num_nodes = client_app, num_nodes
        self.run_config = dict(run_config or {})
        nodes = range(FIRST_NODE_ID, FIRST_NODE_ID + num_nodes)
        self.nodes: Sequence[int] = (
            nodes if available_partitions is None else [FIRST_NODE_ID + partition for partition in available_partitions]
        )
        self.outcomes: Counter[str] = Counter()
        self.first_error = ""
        self._run = empty_run()
        self._ids = count(1)
        self._sent: dict[str, Message] = {}
        self._replies: dict[str, Message] = {}
        self._contexts: dict[int, Context] = {}
        self._one_at_a_time = RLock()
        identify_as_server()

    def set_run(self, run: Any) -> None:
        """Take another run's facts."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run's facts."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """The old way to make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there: 2 for partition 0, 3 for 1..."""
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; a reply can be pulled by the id of its message.

        A message to a node that does not exist is logged and gets no id, as in Flower's own runtimes.
        """
        ids = []
        for message in messages:
            facts = message.metadata
            if facts.dst_node_id not in self.nodes:
                log.error("there is no node %d to send a message to", facts.dst_node_id)
                continue
            if facts.reply_to_message_id or facts.ttl <= 0:
                raise ValueError(f"not a message to a node: {message}")
            number = str(next(self._ids))
            set_message_id(message, number)
            self._sent[number] = detached_copy(message)
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there, after nodes have worked for a tenth of a second, or one for longer."""
        return self._pull(message_ids, until=time.monotonic() + PULL_DURATION_S)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their replies, until ``timeout`` seconds are over.

        What is not done by then can still be pulled, within its time to live.
        """
        until = float("inf") if timeout is None else time.monotonic() + timeout
        return self._pull(self.push_messages(messages), until=until)

    def _pull(self, message_ids: Iterable[str], *, until: float) -> list[Message]:
        replies: list[Message] = []
        for number in dict.fromkeys(message_ids):
            with self._one_at_a_time:
                if number in self._sent and number not in self._replies:
                    if replies and time.monotonic() >= until:
                        continue
                    self._handle(self._sent[number])
                replies.append(self._collected(number))
        return replies

    def _handle(self, message: Message) -> None:
        """Let a node answer a message."""
        if _expired(message):
            return
        number, node = message.metadata.message_id, message.metadata.dst_node_id
        context = _copied_context(self._contexts.get(node) or self._new_context(node))
        try:
            reply = _answer(self.client_app, message, context)
            if context.run_config != self.run_config:
                raise ValueError("the ClientApp changed context.run_config, which must stay as it is")
            self._contexts[node] = context
            self.outcomes["response"] += 1
        except Exception as error:
            self.first_error = self.first_error or traceback.format_exc()
            log.error("node %d: %s", node, error, exc_info=error)
            code = CLIENT_APP_RAISED_EXCEPTION if isinstance(error, client_app_error()) else UNKNOWN_ERROR
            reply = Message(Error(code=code, reason=f"{type(error)}:<'{error}'>"), reply_to=message)
            self.outcomes["error"] += 1
        set_message_id(reply, f"{number}-reply")
        self._replies[number] = reply

    def _collected(self, number: str) -> Message:
        """The reply to a message, which is forgotten; an error if it is gone already or came too late."""
        message, reply = self._sent.pop(number, None), self._replies.pop(number, None)
        if message is None or reply is None or _expired(message):
            return self._gone(
                number, message, MESSAGE_UNAVAILABLE, "the message has expired, or its reply was pulled before"
            )
        if _expired(reply):
            return self._gone(number, message, RESPONSE_UNAVAILABLE, "the reply has expired")
        return reply

    def _gone(self, number: str, message: Message | None, code: int, reason: str) -> Message:
        self.outcomes["error"] += 1
        asked = message or Message(RecordDict(), SERVER, "query")
        set_message_id(asked, number)
        return Message(Error(code=code, reason=reason), reply_to=asked)

    def _new_context(self, node: int) -> Context:
        return Context(
            run_id=self._run.run_id,
            node_id=node,
            node_config={"partition-id": node - FIRST_NODE_ID, "num-partitions": self.num_nodes},
            state=RecordDict(),
            run_config=dict(self.run_config),
        )


def detached_copy(message: Message) -> Message:
    """The same message in records of its own, which share nothing that can be changed."""
    own: Message = copy_message(message)
    if own.has_content():
        own.content = copy_records(message.content)
    return own


def copy_records(records: RecordDict) -> RecordDict:
    """The same records, which share nothing that can be changed."""
    copies = records.copy()
    for key, record in records.items():
        copies[key] = own = cast(Any, record.copy())
        for name, value in record.items():
            if isinstance(value, Array):
                own[name] = shallow_copy(value, FastArray)
            elif isinstance(value, list):
                own[name] = list(value)
    return copies


def _copied_context(context: Context) -> Context:
    return Context(
        run_id=context.run_id,
        node_id=context.node_id,
        node_config=dict(context.node_config),
        state=copy_records(context.state),
        run_config=dict(context.run_config),
    )


def _answer(client_app: ClientApp, message: Message, context: Context) -> Message:
    """What the ClientApp replies; whatever it raises is told as Flower's simulation does."""
    try:
        reply = client_app(message=message, context=context)
    except Exception as error:
        raise client_app_error()(str(error)) from error
    if not isinstance(reply, Message):
        raise client_app_error()(f"it returned {type(reply).__name__}, expected a Message")
    return detached_copy(reply)


def _expired(message: Message) -> bool:
    return message.metadata.created_at + message.metadata.ttl < time.time()
