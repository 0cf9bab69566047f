"""Run the whole protocol in memory, for simulations, tests and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.crypto import Identity
from fedlearn.privacy.secagg.messages import Session
from fedlearn.privacy.secagg.server import Server, ServerStage

Dropouts = Mapping[ServerStage, Collection[int]]  # stage -> clients that do not respond from this stage on


class SecureSum(NamedTuple):
    """The result of a round of secure aggregation.

    Attributes:
        sum: sum of the vectors modulo ``2**bits``.
        clients: clients whose vectors are in the sum.
    """

    sum: np.ndarray
    clients: tuple[int, ...]


def create_clients(clients: Collection[int]) -> tuple[dict[int, Client], dict[int, bytes]]:
    """Return clients with new identities, and their public keys."""
    identities = {client: Identity(client) for client in clients}
    registered = {client: identity.public_key for client, identity in identities.items()}
    return {client: Client(identity, registered) for client, identity in identities.items()}, registered


def create_session(
    vectors_KD: np.ndarray, clients: Collection[int], *, threshold: int, round: int, run: bytes
) -> Session:
    """Return the session that adds the rows of a matrix of unsigned integers."""
    return Session(
        run=run,
        round=round,
        nonce=os.urandom(16),
        clients=tuple(sorted(clients)),
        threshold=threshold,
        length=vectors_KD.shape[1],
        bits=8 * vectors_KD.itemsize,
    )


def run_protocol(
    session: Session,
    clients: Mapping[int, Client],
    registered: Mapping[int, bytes],
    vectors: Mapping[int, np.ndarray],
    *,
    dropouts: Dropouts | None = None,
) -> SecureSum:
    """Run all stages in memory; return the sum.

    Args:
        session: settings of the round.
        clients: clients by id.
        registered: public keys of their identities.
        vectors: vectors of the cohort, by client.
        dropouts: stage -> clients that do not respond from this stage on.

    Raises:
        SecAggAborted: Too few clients are left.
        ProtocolError: A client refuses a message.
    """
    server, dropped = Server(session, registered), set[int]()
    requests = server.start()
    while requests:
        dropped |= set((dropouts or {}).get(server.stage, ()))
        for client, request in requests.items():
            if client not in dropped:
                response = clients[client].respond(request, lambda session, client=client: vectors[client])  # type: ignore[misc]
                server.add(client, response)
        requests = server.advance()
    assert server.total is not None
    return SecureSum(server.total, server.survivors)
