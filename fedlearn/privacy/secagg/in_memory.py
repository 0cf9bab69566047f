"""The whole protocol in memory: for simulations that want the real thing, for tests and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.crypto import Identity
from fedlearn.privacy.secagg.messages import Session
from fedlearn.privacy.secagg.server import Server, ServerStage

Dropouts = Mapping[ServerStage, Collection[int]]  # who stops answering, from which stage on


class SecureSum(NamedTuple):
    """What a round of secure aggregation gives.

    Attributes:
        sum: modulo ``2**bits``.
        clients: whose vectors are in it.
    """

    sum: np.ndarray
    clients: tuple[int, ...]


def create_clients(clients: Collection[int]) -> tuple[dict[int, Client], dict[int, bytes]]:
    """Clients with fresh identities, and the public keys of these."""
    identities = {client: Identity(client) for client in clients}
    registered = {client: identity.public_key for client, identity in identities.items()}
    return {client: Client(identity, registered) for client, identity in identities.items()}, registered


def create_session(
    vectors_KD: np.ndarray, clients: Collection[int], *, threshold: int, round: int, run: bytes
) -> Session:
    """The session that adds the rows of a matrix of unsigned integers."""
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
    """All stages.

    Args:
        session: what to do.
        clients: by id.
        registered: public keys of their identities.
        vectors: of the cohort, by client.
        dropouts: stage -> clients that do not answer from this stage on.

    Raises:
        Aborted: too few clients are left.
        Refused: a client does not accept what it was sent.
    """
    server, gone = Server(session, registered), set[int]()
    requests = server.start()
    while requests:
        gone |= set((dropouts or {}).get(server.stage, ()))
        for client, request in requests.items():
            if client not in gone:
                reply = clients[client].respond(request, lambda session, client=client: vectors[client])  # type: ignore[misc]
                server.add(client, reply)
        requests = server.advance()
    assert server.total is not None
    return SecureSum(server.total, server.survivors)
