"""Run a round with secure aggregation over real nodes. The coordinator can read only the sum of the updates.

The name of the session changes when the coordinator restarts, so an interrupted round can be repeated. Between two
restarts, no round is opened twice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientId, Failure, FailureStage, Request
from fedlearn.loop.client_update import update_size_and_dtype
from fedlearn.privacy.secagg.errors import ProtocolError, SecAggAborted
from fedlearn.privacy.secagg.masked_sum import partial_sum
from fedlearn.privacy.secagg.messages import Session, parties_of
from fedlearn.privacy.secagg.server import ServerStage
from fedlearn.protocol.cohort_request import CohortRequest, Result
from fedlearn.protocol.membership import FederationError, Membership
from fedlearn.protocol.secagg_exchange import SecAggResponse, masking_request, run_secure_sum

log = logging.getLogger(__name__)


class RequestExchange(Protocol):
    """The part of an `Exchange` that a secure round needs."""

    membership: Membership
    layout: Layout

    def run_cohort(self, cohort: CohortRequest[Result]) -> Iterator[Result | Failure]:
        """Send a request to a cohort and yield one result per client."""
        ...


def run_secure_round(
    exchange: RequestExchange,
    request: Request,
    strategy: Strategy,
    cohort: Sequence[ClientId],
    *,
    session_name: str,
    state_rounds: Mapping[ClientId, int],
) -> Iterator[PartialAggregate | Failure]:
    """Yield the sum of the updates of all surviving clients, and a failure for each other client.

    Args:
        exchange: connection to the nodes.
        request: the training order.
        strategy: strategy whose privacy guarantee has a threshold.
        cohort: ids of the clients.
        session_name: name of the session, different after each start of the coordinator.
        state_rounds: for each client, the round of the client state to start from; 0: the initial state.

    Raises:
        SecAggAborted: Clients of fewer parties than the threshold are connected, or responded at a stage. The
            coordinator then knows no part of an update.
        FederationError: The node of a client has no key for secure aggregation.
    """
    members = exchange.membership.members_by_client()
    present = [client for client in cohort if client in members]
    for client in sorted(set(cohort) - set(present)):
        reason = exchange.membership.absence_of(client)
        yield Failure(client=client, stage=FailureStage.NODE, reason=reason, is_delivered=False)
    registered = _masking_keys(exchange.membership, present)
    session = _session(request, strategy, exchange.layout, registered, session_name)

    def send(stage: ServerStage, messages: Mapping[ClientId, bytes]) -> Iterator[SecAggResponse]:
        order = request if stage == ServerStage.MASK else None
        masked = masking_request(session, messages, registered, order=order, state_rounds=state_rounds)
        for result in exchange.run_cohort(masked):
            if isinstance(result, Failure):
                result = SecAggResponse(result.client, reason=f"{result.stage}: {result.reason}")
            yield result

    outcome = run_secure_sum(session, registered, send)
    for failure in outcome.failures:
        if failure.client in outcome.clients:
            log.warning("client %d dropped out after its update was added: %s", failure.client, failure.reason)
        else:
            yield failure
    size = len(outcome.clients)
    _, dtype = update_size_and_dtype(strategy, request, exchange.layout)
    yield PartialAggregate(
        aggregator_state=partial_sum(outcome.sum.astype(dtype, copy=False), size),
        num_updates=size,
        num_examples=size,
        bytes_up=outcome.num_bytes_up,
        clients=outcome.clients,
        num_examples_per_client=(1,) * size,
        num_steps_per_client=(1,) * size,
    )


def _session(
    request: Request, strategy: Strategy, layout: Layout, registered: Mapping[ClientId, bytes], session_name: str
) -> Session:
    """Return the session of a round. Clients of nodes with the same key are one party.

    Raises:
        SecAggAborted: The cohort has clients of too few or too many parties for the threshold.
    """
    guarantee = strategy.privacy_guarantee
    assert guarantee is not None
    assert guarantee.threshold is not None
    length, dtype = update_size_and_dtype(strategy, request, layout)
    clients = tuple(sorted(registered))
    session = Session(
        run=session_name.encode(),
        round=request.round,
        nonce=os.urandom(16),
        clients=clients,
        threshold=guarantee.threshold,
        length=length,
        bits=8 * dtype.itemsize,
        encoding=guarantee.encoding_digest,
        parties=parties_of(clients, registered),
    )
    try:
        session.validate()
    except ProtocolError as error:
        raise SecAggAborted("advertise", f"the connected clients of the cohort: {error}") from error
    return session


def _masking_keys(membership: Membership, clients: Sequence[ClientId]) -> dict[ClientId, bytes]:
    """Return the public masking key of each client.

    Raises:
        FederationError: A node has no key.
    """
    members = membership.members_by_client()
    missing = [client for client in clients if not members[client].masking_key]
    if missing:
        fix = "masking.key and masking.pub of fedlearn.deploy.keys in the --keys folder of these nodes"
        raise FederationError(f"the nodes of clients {missing} have no key for secure aggregation\n  advice    {fix}")
    return {client: bytes.fromhex(members[client].masking_key) for client in clients}
