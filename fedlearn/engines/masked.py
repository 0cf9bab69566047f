"""A round of the grid engine whose updates nobody sees: five exchanges of secure aggregation instead of one.

The session's name changes when the coordinator is started again, so that the round that was under way can be repeated;
within one start no round is opened twice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedlearn.aggregate import Gathered
from fedlearn.client import sent_as_update
from fedlearn.flower.masked import mask_request, masked_of
from fedlearn.flower.members import FederationError
from fedlearn.flower.parcel import WireError
from fedlearn.flower.post import Answer
from fedlearn.flower.replies import SLACK, NoAnswer
from fedlearn.flower.secagg import Reply, summed
from fedlearn.flower.wire import Ask, order_body
from fedlearn.masking import folded
from fedlearn.privacy.secagg.records import Session
from fedlearn.privacy.secagg.server import Stage
from fedlearn.records import ClientId, Failure, Order
from fedlearn.strategy import Strategy

if TYPE_CHECKING:
    from fedlearn.engines.grid import GridEngine

BYTES_A_PEER = 256  # at most, of what a client says about each other one
log = logging.getLogger(__name__)


def masked_round(
    engine: GridEngine, order: Order, strategy: Strategy, cohort: Sequence[ClientId]
) -> Iterator[Gathered | Failure]:
    """The sum of the updates of those who delivered, and a failure for each of the others.

    Raises:
        Aborted: fewer than the threshold answered one of the exchanges; no update, and no part of one, is known then.
        FederationError: a client's node has no key for secure aggregation.
    """
    here = [client for client in cohort if client in engine.members.homes()]
    gone = set(cohort) - set(here)
    yield from (Failure(client=client, stage="node", reason="no node with this client is connected") for client in gone)
    registered = _registered(engine, here)
    length, dtype = sent_as_update(strategy, order, engine.layout)
    assert strategy.protection is not None
    session = Session(
        run=f"{engine.run}/{engine.attempt}".encode(),
        round=order.round,
        nonce=os.urandom(16),
        clients=tuple(here),
        threshold=strategy.protection.facts["threshold"],
        length=length,
        bits=8 * dtype.itemsize,
    )

    def exchange(stage: Stage, messages: Mapping[ClientId, bytes]) -> Iterator[Reply]:
        return _exchange(engine, order if stage == Stage.MASK else None, messages, registered, session)

    outcome = summed(session, registered, exchange)
    for failure in outcome.failures:
        if failure.client in outcome.clients:
            log.warning("client %d, whose update is in the sum, then fell silent: %s", failure.client, failure.reason)
        else:
            yield failure
    size = len(outcome.clients)
    yield Gathered(
        fold=folded(outcome.sum.astype(dtype, copy=False), size),
        num_updates=size,
        num_examples=size,
        bytes_up=outcome.bytes_up,
        clients=outcome.clients,
        examples=(1,) * size,
        steps=(1,) * size,
    )


def _registered(engine: GridEngine, clients: Sequence[ClientId]) -> dict[ClientId, bytes]:
    homes = engine.members.homes()
    without = [client for client in clients if not homes[client].masking]
    if without:
        fix = "masking.key and masking.pub, which fedlearn.deploy.keys made, in the --keys folder of their nodes"
        raise FederationError(f"the nodes of clients {without} have no key for secure aggregation\n  try       {fix}")
    return {client: bytes.fromhex(homes[client].masking) for client in clients}


def _exchange(
    engine: GridEngine,
    order: Order | None,
    messages: Mapping[ClientId, bytes],
    registered: Mapping[ClientId, bytes],
    session: Session,
) -> Iterator[Reply]:
    """A reply for each message."""
    homes = engine.members.homes()
    at: dict[int, list[ClientId]] = {}
    for client in messages:
        at.setdefault(homes[client].node, []).append(client)
    asks = {node: engine.ask("mask", clients) for node, clients in at.items()}
    requests = {
        node: mask_request(
            ask, {client: messages[client] for client in ask.clients}, registered, since=engine.since(ask.clients)
        )
        for node, ask in asks.items()
    }
    body = order_body(order) if order else b""
    for answer in engine.post.exchange(requests, body, round=session.round, seconds=engine.deadline):
        yield from _read(engine, answer, asks[answer.node], session)


def _read(engine: GridEngine, answer: Answer, ask: Ask, session: Session) -> Iterator[Reply]:
    most = SLACK + len(ask.clients) * (session.length * session.bits // 8 + BYTES_A_PEER * len(session.clients))
    try:
        found = masked_of(engine.parcel(answer, ask, most), ask)
    except (NoAnswer, WireError) as error:
        log.warning("%s", error)
        yield from (Reply(client, reason=str(error)) for client in ask.clients)
        return
    for client in ask.clients:
        said = found.get(client, b"")
        if isinstance(said, Failure):
            yield Reply(client, reason=f"{said.stage}: {said.reason}")
        else:
            yield Reply(client, said, "" if said else "the answer of its node leaves it out")
