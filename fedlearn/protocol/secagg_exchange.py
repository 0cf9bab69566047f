"""Secure aggregation: the coordinator's side of a round, for any way in which messages travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedlearn.core.records import ClientId, Failure, FailureStage
from fedlearn.privacy.secagg.errors import ProtocolError, SecAggAborted
from fedlearn.privacy.secagg.messages import Session
from fedlearn.privacy.secagg.server import Server, ServerStage

NAME = "secagg"  # prefix of the stages of failures


class SecAggResponse(NamedTuple):
    """A client's answer to a message of the protocol, or why there is none."""

    client: ClientId
    payload: bytes = b""
    reason: str = ""


Exchange = Callable[[ServerStage, Mapping[ClientId, bytes]], Iterator[SecAggResponse]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SecureSumResult:
    """What a round of secure aggregation brought.

    Attributes:
        sum: of the survivors' vectors, modulo ``2**bits``.
        clients: the survivors.
        failures: of clients that fell silent or refused, at whichever stage, survivors among them.
        num_bytes_up: of all replies.
    """

    sum: np.ndarray
    clients: tuple[ClientId, ...]
    failures: tuple[Failure, ...]
    num_bytes_up: int


def run_secure_sum(session: Session, registered: Mapping[ClientId, bytes], exchange: Exchange) -> SecureSumResult:
    """Run all stages and return the sum.

    Args:
        session: whose vectors to add, and how.
        registered: client -> public key of its identity.
        exchange: ``(stage, client -> message) -> replies``, in any order; it ends by itself.

    *Guarantees*: the exact sum if at least ``session.threshold`` clients answer each stage; otherwise no sum and no
    part of one.

    Raises:
        Aborted: too few clients answered a stage; the message names the stage and the first failure.
    """
    server, failures, bytes_up = Server(session, registered), list[Failure](), 0
    requests = server.start()
    while requests:
        for reply in exchange(server.stage, requests):
            bytes_up += len(reply.payload)
            reason = reply.reason or _taken(server, reply)
            if reason:
                stage = FailureStage[f"SECAGG_{server.stage.name}"]
                failures.append(Failure(client=reply.client, stage=stage, reason=reason))
        requests = _advanced(server, failures)
    assert server.total is not None
    return SecureSumResult(sum=server.total, clients=server.survivors, failures=tuple(failures), num_bytes_up=bytes_up)


def _taken(server: Server, reply: SecAggResponse) -> str:
    """Hand a reply to the server; the reason if it does not take it."""
    try:
        server.add(reply.client, reply.payload)
    except ProtocolError as refused:
        return str(refused)
    return ""


def _advanced(server: Server, failures: list[Failure]) -> dict[ClientId, bytes]:
    try:
        return server.advance()
    except SecAggAborted as aborted:
        first = f"; the first: client {failures[0].client}, {failures[0].reason}" if failures else ""
        raise SecAggAborted(aborted.stage, f"{aborted.cause}{first}", tuple(failures)) from None
