"""The whole protocol in memory: for simulations that want the real thing, for tests and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.keys import Identity
from fedlearn.privacy.secagg.records import Session
from fedlearn.privacy.secagg.server import Server, Stage

Silent = Mapping[Stage, Collection[int]]  # who stops answering, from which stage on


class Total(NamedTuple):
    """What a round of secure aggregation gives.

    Attributes:
        sum: modulo ``2**bits``.
        clients: whose vectors are in it.
    """

    sum: np.ndarray
    clients: tuple[int, ...]


def strangers(clients: Collection[int]) -> tuple[dict[int, Client], dict[int, bytes]]:
    """Clients with fresh identities, and the public keys of these."""
    identities = {client: Identity(client) for client in clients}
    registered = {client: identity.public for client, identity in identities.items()}
    return {client: Client(identity, registered) for client, identity in identities.items()}, registered


def session_of(vectors_KD: np.ndarray, clients: Collection[int], *, threshold: int, round: int, run: bytes) -> Session:
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


def run(
    session: Session,
    clients: Mapping[int, Client],
    registered: Mapping[int, bytes],
    vectors: Mapping[int, np.ndarray],
    *,
    silent: Silent | None = None,
) -> Total:
    """All stages.

    Args:
        session: what to do.
        clients: by id.
        registered: public keys of their identities.
        vectors: of the cohort, by client.
        silent: stage -> clients that do not answer from this stage on.

    Raises:
        Aborted: too few clients are left.
        Refused: a client does not accept what it was sent.
    """
    server, gone = Server(session, registered), set[int]()
    requests = server.open()
    while requests:
        gone |= set((silent or {}).get(server.stage, ()))
        for client, request in requests.items():
            if client not in gone:
                reply = clients[client].answer(request, lambda session, client=client: vectors[client])  # type: ignore[misc]
                server.add(client, reply)
        requests = server.advance()
    assert server.total is not None
    return Total(server.total, server.survivors)
