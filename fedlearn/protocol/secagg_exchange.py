"""Transport the messages of secure aggregation between coordinator and nodes.

`fedlearn.privacy.secagg` has the protocol. This module has the coordinator's side of a round (`run_secure_sum`), for
any transport. It also packs and reads the contents of requests and responses of kind ``mask``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedlearn.core.records import ClientId, Failure, FailureStage, Request
from fedlearn.core.serialization import Payload, WireError, read_fields, select_prefix, with_prefix
from fedlearn.privacy.secagg.errors import ProtocolError, SecAggAborted
from fedlearn.privacy.secagg.messages import Session
from fedlearn.privacy.secagg.server import Server, ServerStage
from fedlearn.protocol.cohort_request import CohortRequest
from fedlearn.protocol.messages import RequestKind
from fedlearn.protocol.responses import RESPONSE_OVERHEAD_BYTES
from fedlearn.protocol.training_order import pack_order

BYTES_PER_PEER = 256  # size limit of the part of a message about another client


class SecAggResponse(NamedTuple):
    """The response of a client to a message of the protocol, or the reason of its failure."""

    client: ClientId
    payload: bytes = b""
    reason: str = ""


ExchangeMessages = Callable[[ServerStage, Mapping[ClientId, bytes]], Iterator[SecAggResponse]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SecureSumResult:
    """The result of a round of secure aggregation.

    Attributes:
        sum: sum of the vectors of the surviving clients, modulo ``2**bits``.
        clients: the surviving clients.
        failures: clients that dropped out or refused at any stage; surviving clients may be among them.
        num_bytes_up: bytes of all responses.
    """

    sum: np.ndarray
    clients: tuple[ClientId, ...]
    failures: tuple[Failure, ...]
    num_bytes_up: int


def run_secure_sum(
    session: Session, registered: Mapping[ClientId, bytes], exchange: ExchangeMessages
) -> SecureSumResult:
    """Run all stages of the protocol and return the sum.

    Args:
        session: parameters of the sum.
        registered: client -> public key of its identity.
        exchange: function ``(stage, client -> message) -> responses``. It yields responses in any order, and stops at a
            deadline.

    Guarantees:
        The exact sum, if at least ``session.threshold`` clients respond at each stage; otherwise no part of a sum.

    Raises:
        SecAggAborted: Too few clients responded at a stage; the error names the stage and the first failure.
    """
    server, failures, bytes_up = Server(session, registered), list[Failure](), 0
    messages = server.start()
    while messages:
        for response in exchange(server.stage, messages):
            bytes_up += len(response.payload)
            reason = response.reason or _add(server, response)
            if reason:
                stage = FailureStage[f"SECAGG_{server.stage.name}"]
                failures.append(Failure(client=response.client, stage=stage, reason=reason))
        messages = _advance(server, failures)
    assert server.total is not None
    return SecureSumResult(sum=server.total, clients=server.survivors, failures=tuple(failures), num_bytes_up=bytes_up)


def masking_request(
    session: Session,
    messages: Mapping[ClientId, bytes],
    registered: Mapping[ClientId, bytes],
    *,
    order: Request | None,
    state_rounds: Mapping[ClientId, int],
) -> CohortRequest[SecAggResponse]:
    """Return the request with a message to each client.

    Args:
        session: parameters of the sum.
        messages: client -> message.
        registered: client -> public key, for the whole cohort.
        order: training order at the stage ``mask``; None at all other stages.
        state_rounds: for each client, the round of the client state to start from.
    """

    def content_for(clients: Sequence[ClientId]) -> Payload:
        return pack_mask_request({client: messages[client] for client in clients}, registered)

    return CohortRequest(
        kind=RequestKind.MASK,
        round=session.round,
        clients=list(messages),
        reader=MaskReader(session=session),
        shared=pack_order(order) if order else Payload(),
        content_for=content_for,
        state_rounds=state_rounds,
    )


def pack_mask_request(messages: Mapping[ClientId, bytes], registered: Mapping[ClientId, bytes]) -> Payload:
    """Return the messages to the clients of a node, and the public keys of the cohort, as the content of a request."""
    arrays = with_prefix("message/", {str(client): _to_array(message) for client, message in messages.items()})
    return Payload(
        metadata={"registered": {str(client): key.hex() for client, key in registered.items()}}, arrays=arrays
    )


def read_mask_request(
    content: Payload, clients: Sequence[ClientId]
) -> tuple[dict[ClientId, bytes], dict[ClientId, bytes]]:
    """Return the message to each client, and the public keys of the cohort.

    Raises:
        WireError: A message is missing, or the content is malformed.
    """
    try:
        keys = read_fields(content.metadata, registered=dict)["registered"]
        registered = {int(client): bytes.fromhex(key) for client, key in keys.items()}
    except (ValueError, TypeError) as error:
        raise WireError(f"the public keys cannot be read: {error}") from error
    return _read_messages(content, "message/", clients), registered


def pack_mask_response(responses: Mapping[ClientId, bytes]) -> Payload:
    """Return the responses of clients as the content of a response."""
    arrays = {str(client): _to_array(response) for client, response in responses.items()}
    return Payload(arrays=with_prefix("response/", arrays))


@dataclass(frozen=True, kw_only=True)
class MaskReader:
    """Read the responses of clients to messages of secure aggregation.

    Args:
        session: parameters of the sum, for the size limit.
    """

    session: Session
    may_omit_clients: bool = False

    def max_bytes(self, num_clients: int) -> int:
        """Return the size limit of a response with the messages of this many clients."""
        vector = self.session.length * self.session.bits // 8
        return RESPONSE_OVERHEAD_BYTES + num_clients * (vector + BYTES_PER_PEER * len(self.session.clients))

    def read(self, content: Payload, clients: Sequence[ClientId]) -> list[SecAggResponse]:
        """Return the response of each client.

        Raises:
            WireError: A response is missing or malformed.
        """
        responses = _read_messages(content, "response/", clients)
        return [SecAggResponse(client, responses[client]) for client in clients]


def _to_array(message: bytes) -> np.ndarray:
    return np.frombuffer(message, np.uint8)


def _read_messages(content: Payload, prefix: str, clients: Sequence[ClientId]) -> dict[ClientId, bytes]:
    names = {f"{prefix}{client}": client for client in clients}
    if content.arrays.keys() != names.keys():
        raise WireError(f"the content has the messages {sorted(content.arrays)[:9]}, expected {sorted(names)[:9]}")
    if any(array.dtype != np.uint8 or array.ndim != 1 for array in content.arrays.values()):
        raise WireError("a message is not a vector of bytes")
    messages = select_prefix(content.arrays, prefix)
    return {client: messages[str(client)].tobytes() for client in clients}


def _add(server: Server, response: SecAggResponse) -> str:
    """Add a response to the server; return the reason if the server refuses it."""
    try:
        server.add(response.client, response.payload)
    except ProtocolError as refused:
        return str(refused)
    return ""


def _advance(server: Server, failures: list[Failure]) -> dict[ClientId, bytes]:
    try:
        return server.advance()
    except SecAggAborted as aborted:
        first = f"; the first: client {failures[0].client}, {failures[0].reason}" if failures else ""
        raise SecAggAborted(aborted.stage, f"{aborted.cause}{first}", tuple(failures)) from None
