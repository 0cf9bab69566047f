"""A round of the grid engine whose updates nobody sees: five exchanges of secure aggregation instead of one.

The session's name changes when the coordinator is started again, so that the round that was under way can be repeated;
within one start no round is opened twice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.records import ClientId, Failure, FailureStage, Request
from fedlearn.core.serialization import WireError
from fedlearn.loop.client_update import update_size_and_dtype
from fedlearn.privacy.secagg.masked_sum import partial_sum
from fedlearn.privacy.secagg.messages import Session
from fedlearn.privacy.secagg.server import ServerStage
from fedlearn.protocol.grid_client import ResponseMessage
from fedlearn.protocol.membership import FederationError
from fedlearn.protocol.requests import RequestHeader, pack_request_body
from fedlearn.protocol.responses import RESPONSE_OVERHEAD_BYTES, InvalidResponse
from fedlearn.protocol.secagg_exchange import SecAggResponse, run_secure_sum
from fedlearn.protocol.secagg_messages import pack_mask_request, read_mask_response

if TYPE_CHECKING:
    from fedlearn.engines.deployed import GridEngine

BYTES_PER_PEER = 256  # at most, of what a client says about each other one
log = logging.getLogger(__name__)


def run_secure_round(
    engine: GridEngine, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
) -> Iterator[PartialAggregate | Failure]:
    """The sum of the updates of those who delivered, and a failure for each of the others.

    Raises:
        Aborted: fewer than the threshold answered one of the exchanges; no update, and no part of one, is known then.
        FederationError: a client's node has no key for secure aggregation.
    """
    here = [client for client in cohort if client in engine.membership.members_by_client()]
    gone = set(cohort) - set(here)
    yield from (
        Failure(client=client, stage=FailureStage.NODE, reason="no node with this client is connected")
        for client in gone
    )
    registered = _registered(engine, here)
    length, dtype = update_size_and_dtype(strategy, request, engine.layout)
    assert strategy.privacy_guarantee is not None
    assert strategy.privacy_guarantee.threshold is not None
    session = Session(
        run=f"{engine.run}/{engine.attempt_id}".encode(),
        round=request.round,
        nonce=os.urandom(16),
        clients=tuple(here),
        threshold=strategy.privacy_guarantee.threshold,
        length=length,
        bits=8 * dtype.itemsize,
    )

    def exchange(stage: ServerStage, messages: Mapping[ClientId, bytes]) -> Iterator[SecAggResponse]:
        return _exchange(engine, request if stage == ServerStage.MASK else None, messages, registered, session)

    outcome = run_secure_sum(session, registered, exchange)
    for failure in outcome.failures:
        if failure.client in outcome.clients:
            log.warning("client %d, whose update is in the sum, then fell silent: %s", failure.client, failure.reason)
        else:
            yield failure
    size = len(outcome.clients)
    yield PartialAggregate(
        aggregator_state=partial_sum(outcome.sum.astype(dtype, copy=False), size),
        num_updates=size,
        num_examples=size,
        bytes_up=outcome.num_bytes_up,
        clients=outcome.clients,
        num_examples_per_client=(1,) * size,
        num_steps_per_client=(1,) * size,
    )


def _registered(engine: GridEngine, clients: Sequence[ClientId]) -> dict[ClientId, bytes]:
    homes = engine.membership.members_by_client()
    without = [client for client in clients if not homes[client].masking_key]
    if without:
        fix = "masking.key and masking.pub, which fedlearn.deploy.keys made, in the --keys folder of their nodes"
        raise FederationError(f"the nodes of clients {without} have no key for secure aggregation\n  try       {fix}")
    return {client: bytes.fromhex(homes[client].masking_key) for client in clients}


def _exchange(
    engine: GridEngine,
    order: Request | None,
    messages: Mapping[ClientId, bytes],
    registered: Mapping[ClientId, bytes],
    session: Session,
) -> Iterator[SecAggResponse]:
    """A reply for each message."""
    homes = engine.membership.members_by_client()
    at: dict[int, list[ClientId]] = {}
    for client in messages:
        at.setdefault(homes[client].node_id, []).append(client)
    asks = {node: engine.build_header("mask", clients) for node, clients in at.items()}
    requests = {
        node: pack_mask_request(
            ask,
            {client: messages[client] for client in ask.clients},
            registered,
            since=engine.state_rounds(ask.clients),
        )
        for node, ask in asks.items()
    }
    body = pack_request_body(order) if order else b""
    for answer in engine.grid_client.exchange(requests, body, round=session.round, timeout_s=engine.deadline):
        yield from _read(engine, answer, asks[answer.node_id], session)


def _read(
    engine: GridEngine, answer: ResponseMessage, ask: RequestHeader, session: Session
) -> Iterator[SecAggResponse]:
    most = RESPONSE_OVERHEAD_BYTES + len(ask.clients) * (
        session.length * session.bits // 8 + BYTES_PER_PEER * len(session.clients)
    )
    try:
        found = read_mask_response(engine.read_payload(answer, ask, most), ask)
    except (InvalidResponse, WireError) as error:
        log.warning("%s", error)
        yield from (SecAggResponse(client, reason=str(error)) for client in ask.clients)
        return
    for client in ask.clients:
        said = found.get(client, b"")
        if isinstance(said, Failure):
            yield SecAggResponse(client, reason=f"{said.stage}: {said.reason}")
        else:
            yield SecAggResponse(client, said, "" if said else "the answer of its node leaves it out")
