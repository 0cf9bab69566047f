"""Secure aggregation over Flower: a workflow for any `Grid`, and the handler of a ``ClientApp`` that answers it.

```
app = ClientApp()
mount(app, client=..., vector=...)                                          # on the nodes

outcome = secure_sum(grid, session, nodes, registered, timeout=60.0)        # in the ServerApp
```

What a client must remember between messages stays in its ``Context.state``, which Flower keeps on the node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedlearn.errors import is_number, require
from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.errors import Aborted, Refused
from fedlearn.privacy.secagg.records import Session
from fedlearn.privacy.secagg.server import Server, Stage
from fedlearn.records import ClientId, Failure

NAME = "secagg"  # of the action, of the record in a message, and of those in a node's state
SHORTEST, LONGEST = 0.02, 0.5  # seconds between two looks for replies

MakeClient = Callable[[Context, ClientId, bytes], Client]
MakeVector = Callable[[Session, ClientId, RecordDict, Context], np.ndarray]


def mount(app: ClientApp, *, client: MakeClient, vector: MakeVector) -> None:
    """Let an app answer `secure_sum`.

    Args:
        app: gets a query handler with the action ``secagg``.
        client: ``(context, client, kept) -> Client``, with that client's identity and the registered keys; a node may
            hold several clients.
        vector: ``(session, client, content, context) -> vector``, what this client adds; ``content`` is what
            `secure_sum` was given to send along, for example the model to train from.
    """

    @app.query(NAME)
    def secagg(message: Message, context: Context) -> Message:
        return answer(message, context, client=client, vector=vector)


def answer(message: Message, context: Context, *, client: MakeClient, vector: MakeVector) -> Message:
    """The reply to one message; a refusal is a reply too, which says why."""
    asked, state = message.content.config_records[NAME], context.state.config_records
    number, request = cast(int, asked["client"]), cast(bytes, asked["message"])
    kept = cast(bytes, state[_place(number)]["kept"]) if _place(number) in state else b""
    own = client(context, number, kept)
    try:
        reply = own.answer(request, lambda session: vector(session, number, message.content, context))
    except Refused as refused:
        return Message(RecordDict({NAME: ConfigRecord({"client": number, "refused": str(refused)})}), reply_to=message)
    state[_place(number)] = ConfigRecord({"kept": own.kept})
    return Message(RecordDict({NAME: ConfigRecord({"client": number, "message": reply})}), reply_to=message)


class Reply(NamedTuple):
    """A client's answer to a message of the protocol, or why there is none."""

    client: ClientId
    payload: bytes = b""
    reason: str = ""


Exchange = Callable[[Stage, Mapping[ClientId, bytes]], Iterator[Reply]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a round of secure aggregation brought.

    Attributes:
        sum: of the survivors' vectors, modulo ``2**bits``.
        clients: the survivors.
        failures: of clients that fell silent or refused, at whichever stage, survivors among them.
        bytes_up: of all replies.
    """

    sum: np.ndarray
    clients: tuple[ClientId, ...]
    failures: tuple[Failure, ...]
    bytes_up: int


def secure_sum(
    grid: Grid,
    session: Session,
    nodes: Mapping[ClientId, int],
    registered: Mapping[ClientId, bytes],
    *,
    timeout: float,
    vector_timeout: float | None = None,
    content: RecordDict | None = None,
) -> Outcome:
    """Run all stages.

    Args:
        grid: Flower's way to the nodes.
        session: whose vectors to add, and how.
        nodes: client -> Flower's id of the node that holds it.
        registered: client -> public key of its identity.
        timeout: seconds that clients have to answer a stage, > 0.
        vector_timeout: the same for the stage in which they make their vectors; None takes ``timeout``.
        content: more records for the stage in which clients make their vectors.

    *Guarantees*: ends after at most five timeouts; the exact sum if at least ``session.threshold`` clients answer each
    stage, no sum and no part of one otherwise.

    Raises:
        Aborted: too few answered a stage; says which, and what was wrong with the others.
    """
    for name, seconds in (("timeout", timeout), ("vector_timeout", vector_timeout or timeout)):
        ok = is_number(seconds, at_least=0) and 0 < seconds < float("inf")
        require(ok, name, seconds, "a number of seconds > 0", f"{name}=60")

    def exchange(stage: Stage, requests: Mapping[ClientId, bytes]) -> Iterator[Reply]:
        masks = stage == Stage.MASK
        seconds = (vector_timeout if masks else None) or timeout
        return _exchange(grid, _messages(requests, nodes, session, seconds, content if masks else None), seconds)

    return summed(session, registered, exchange)


def summed(session: Session, registered: Mapping[ClientId, bytes], exchange: Exchange) -> Outcome:
    """Run all stages, whatever way messages travel.

    Args:
        session: whose vectors to add, and how.
        registered: client -> public key of its identity.
        exchange: ``(stage, client -> message) -> replies``, in any order; it ends by itself.

    Raises:
        Aborted: see `secure_sum`.
    """
    server, failures, bytes_up = Server(session, registered), list[Failure](), 0
    requests = server.open()
    while requests:
        for reply in exchange(server.stage, requests):
            bytes_up += len(reply.payload)
            reason = reply.reason or _taken(server, reply)
            if reason:
                stage = f"{NAME}.{server.stage.name.lower()}"
                failures.append(Failure(client=reply.client, stage=stage, reason=reason))
        requests = _advanced(server, failures)
    assert server.total is not None
    return Outcome(sum=server.total, clients=server.survivors, failures=tuple(failures), bytes_up=bytes_up)


def _messages(
    requests: Mapping[ClientId, bytes],
    nodes: Mapping[ClientId, int],
    session: Session,
    seconds: float,
    content: RecordDict | None,
) -> dict[ClientId, Message]:
    return {
        client: Message(
            RecordDict({**(content or {}), NAME: ConfigRecord({"client": client, "message": request})}),
            nodes[client],
            f"query.{NAME}",
            ttl=seconds,
            group_id=str(session.round),
        )
        for client, request in requests.items()
    }


def _exchange(grid: Grid, messages: Mapping[ClientId, Message], seconds: float) -> Iterator[Reply]:
    """A reply for every message, in order of arrival; what has not come when time is up is told so."""
    ends, pause = time.monotonic() + seconds, SHORTEST
    ids = list(grid.push_messages(messages.values()))
    waiting = {message: client for message, client in zip(ids, messages, strict=True) if message}
    yield from (
        Reply(client, reason="Flower did not take the message") for client in set(messages) - set(waiting.values())
    )
    while waiting:
        arrived = list(grid.pull_messages(list(waiting)))
        for message in arrived:
            client = waiting.pop(message.metadata.reply_to_message_id, None)
            if client is not None:
                yield _read(client, message)
        left = ends - time.monotonic()
        if not waiting or left <= 0:
            break
        pause = SHORTEST if arrived else min(1.3 * pause, LONGEST)
        time.sleep(min(pause, left))
    yield from (Reply(client, reason=f"no answer within {seconds:g} s") for client in waiting.values())


def _read(client: ClientId, message: Message) -> Reply:
    if message.has_error():
        return Reply(client, reason=(message.error.reason or "the client failed").strip().splitlines()[-1])
    record = message.content.config_records.get(NAME, ConfigRecord())
    payload, refused = record.get("message", b""), record.get("refused", "")
    if not isinstance(payload, bytes) or not isinstance(refused, str):
        return Reply(client, reason="the reply is none of secure aggregation")
    return Reply(client, payload, f"the client refused: {refused}" if refused else "")


def _taken(server: Server, reply: Reply) -> str:
    """Hand a reply to the server; the reason if it does not take it."""
    try:
        server.add(reply.client, reply.payload)
    except Refused as refused:
        return str(refused)
    return ""


def _advanced(server: Server, failures: list[Failure]) -> dict[ClientId, bytes]:
    try:
        return server.advance()
    except Aborted as aborted:
        first = f"; the first: client {failures[0].client}, {failures[0].reason}" if failures else ""
        raise Aborted(aborted.stage, f"{aborted.cause}{first}", tuple(failures)) from None


def _place(client: ClientId) -> str:
    """Where a client's notes lie in the state of its node."""
    return f"{NAME}.{client}"
