"""The server of secure aggregation; it collects the responses of a stage and returns the messages of the next stage.

```
server = Server(session, registered)
requests = server.start()  # client -> message

while requests:
    for client, response in exchange(requests):  # until the deadline
        server.add(client, response)
    requests = server.advance()

total = server.total
```

`Server.add` raises `ProtocolError` if one client failed; the caller continues. `Server.advance` raises `SecAggAborted`
if too few parties are left.

Reference: Bonawitz et al., CCS 2017, Figure 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np

from fedlearn.privacy.secagg import crypto, shamir
from fedlearn.privacy.secagg.errors import SecAggAborted, reject_if
from fedlearn.privacy.secagg.messages import (
    Confirmation,
    EncryptedShares,
    KeyDirectory,
    MaskedVector,
    PublicKeys,
    ReceivedShares,
    Session,
    Survivors,
    UnmaskRequest,
    UnmaskShares,
    decode,
    encode,
)
from fedlearn.privacy.secagg.shamir import SECRET_BYTES


class ServerStage(IntEnum):
    """The stage whose responses the server expects."""

    ADVERTISE = 0
    SHARE = 1
    MASK = 2
    CONFIRM = 3
    OPEN = 4
    DONE = 5


RESPONSE_TYPES = {
    ServerStage.ADVERTISE: PublicKeys,
    ServerStage.SHARE: EncryptedShares,
    ServerStage.MASK: MaskedVector,
    ServerStage.CONFIRM: Confirmation,
    ServerStage.OPEN: UnmaskShares,
}


class Server:
    """The server of one attempt at one round.

    Args:
        session: settings of the attempt.
        registered: client -> public key of its identity.

    Attributes:
        stage: stage whose responses are expected.
        survivors: clients whose vectors are in the sum; known after the stage ``mask``.
        total: the sum modulo ``2**bits``; None before the end, and after an abort.

    *Guarantees*: if clients of at least ``threshold`` parties respond in each stage, ``total`` is the exact sum of the
    survivors' vectors modulo ``2**bits``, for all dropouts. Otherwise `SecAggAborted` is raised, and there is no total.
    The memory is one vector for any number of clients.
    """

    def __init__(self, session: Session, registered: Mapping[int, bytes]) -> None:
        session.validate()
        self.session, self.registered = session, registered
        self.stage = ServerStage.ADVERTISE
        self.survivors: tuple[int, ...] = ()
        self.dropped: tuple[int, ...] = ()
        self.total: np.ndarray | None = None
        self._digest, self._share_index = crypto.digest(session), session.share_indices()
        self._requested: set[int] = set(session.clients)
        self._responses: dict[int, Any] = {}
        self._roster: dict[int, PublicKeys] = {}
        self._sum = np.zeros(session.length, session.dtype)
        self._check_key = crypto.private_key(crypto.generate_secret())

    def start(self) -> dict[int, bytes]:
        """Return the first messages: client -> message."""
        return dict.fromkeys(self.session.clients, encode(self.session))

    def add(self, client: int, response: bytes) -> None:
        """Accept one response.

        Args:
            client: sender, which the transport has authenticated.
            response: received bytes.

        Raises:
            ProtocolError: The response is late, repeated or not acceptable; the state is unchanged.
        """
        reject_if(self.stage == ServerStage.DONE, "the round is over")
        record = decode(response, RESPONSE_TYPES[self.stage])
        reject_if(record.client != client, f"client {client} sent a response of client {record.client}")
        reject_if(record.session != self._digest, f"the response of client {client} belongs to another session")
        reject_if(
            client not in self._requested or client in self._responses,
            f"no response of client {client} is expected, or it has responded already",
        )
        self._responses[client] = _ACCEPT[self.stage](self, record)

    def advance(self) -> dict[int, bytes]:
        """End the stage; return the messages of the next stage, client -> message, or nothing at the end.

        Raises:
            SecAggAborted: Fewer than ``threshold`` parties responded, or the revealed shares are inconsistent.
        """
        count, size = map(self.session.num_parties, (self._responses, self._requested))
        if count < self.session.threshold:
            raise self._abort(f"{count} of {size} parties responded, fewer than threshold {self.session.threshold}")
        stage, responses = self.stage, dict(sorted(self._responses.items()))
        requests = _NEXT[stage](self, responses)
        self.stage, self._requested, self._responses = ServerStage(stage + 1), set(requests), {}
        return requests

    def _abort(self, cause: str) -> SecAggAborted:
        stage, self.stage = self.stage, ServerStage.DONE
        self.total, self._responses = None, {}
        self._sum = np.zeros(0, self.session.dtype)
        return SecAggAborted(stage.name.lower(), cause)

    def _accept_keys(self, keys: PublicKeys) -> PublicKeys:
        crypto.verify_keys(keys, self.registered)
        known = {key for other in self._responses.values() for key in (other.encryption_key, other.mask_key)}
        reject_if(
            keys.encryption_key == keys.mask_key or bool(known & {keys.encryption_key, keys.mask_key}),
            "a public key appears twice",
        )
        for key in (keys.encryption_key, keys.mask_key):  # an invalid key would make all other clients refuse
            crypto.agree_key(self._check_key, key, b"check")
        return keys

    def _accept_shares(self, shares: EncryptedShares) -> EncryptedShares:
        due = set(self._roster) - {shares.client}
        reject_if(set(shares.encrypted) != due, f"client {shares.client} has not encrypted a share for each client")
        return shares

    def _accept_vector(self, masked: MaskedVector) -> bool:
        fits = len(masked.vector) == self._sum.nbytes
        reject_if(not fits, f"client {masked.client} sent a vector of another length")
        self._sum += np.frombuffer(masked.vector, self.session.dtype)
        return True

    def _accept_confirmation(self, confirmation: Confirmation) -> bytes:
        client = confirmation.client
        message = crypto.survivors_statement(self._survivors_record)
        crypto.verify(self.registered[client], confirmation.signature, message, signer=f"client {client}")
        return confirmation.signature

    def _accept_reveal(self, reveal: UnmaskShares) -> UnmaskShares:
        is_complete = tuple(reveal.seed_shares) == self.survivors and tuple(reveal.key_shares) == self.dropped
        reject_if(not is_complete, f"client {reveal.client} has not revealed the requested shares")
        values = [reveal.seed, *reveal.seed_shares.values(), *reveal.key_shares.values()]
        reject_if(
            any(len(value) != SECRET_BYTES for value in values), f"a share from client {reveal.client} has a wrong size"
        )
        return reveal

    @property
    def _survivors_record(self) -> Survivors:
        return Survivors(session=self._digest, survivors=self.survivors, dropped=self.dropped)

    def _send_keys(self, responses: Mapping[int, PublicKeys]) -> dict[int, bytes]:
        encoded, self._roster = {client: encode(keys) for client, keys in responses.items()}, dict(responses)
        return dict.fromkeys(responses, encode(KeyDirectory(session=self._digest, keys=encoded)))

    def _send_shares(self, responses: Mapping[int, EncryptedShares]) -> dict[int, bytes]:
        self._roster = {client: self._roster[client] for client in responses}
        return {
            client: encode(
                ReceivedShares(
                    session=self._digest,
                    client=client,
                    encrypted={
                        sender: shares.encrypted[client] for sender, shares in responses.items() if sender != client
                    },
                )
            )
            for client in responses
        }

    def _send_survivors(self, responses: Mapping[int, bool]) -> dict[int, bytes]:
        self.survivors = tuple(responses)
        self.dropped = tuple(sorted(set(self._roster) - set(responses)))
        return dict.fromkeys(responses, encode(self._survivors_record))

    def _request_unmasking(self, responses: Mapping[int, bytes]) -> dict[int, bytes]:
        shown = self._survivors_record
        opening = UnmaskRequest(
            session=shown.session, survivors=shown.survivors, dropped=shown.dropped, signatures=responses
        )
        return dict.fromkeys(responses, encode(opening))

    def _compute_total(self, responses: Mapping[int, UnmaskShares]) -> dict[int, bytes]:
        for client in self.survivors:
            seed = (
                responses[client].seed if client in responses else self._reconstruct(client, responses, "seed_shares")
            )
            crypto.add_mask(self._sum, crypto.self_mask_key(seed, self._digest, client), sign=-1)
        for dropout in self.dropped:
            self._remove_pairs(dropout, self._reconstruct(dropout, responses, "key_shares"))
        self.total = self._sum
        return {}

    def _remove_pairs(self, dropout: int, secret: bytes) -> None:
        """Remove the masks between a dropped client and each survivor from the sum."""
        if crypto.derive_public_key(secret) != self._roster[dropout].mask_key:
            raise self._abort(f"the shares for client {dropout} do not give the secret of its key")
        private = crypto.private_key(secret)
        for client in self.survivors:
            key = crypto.pairwise_mask_key(private, self._roster[client].mask_key, self._digest, dropout, client)
            crypto.add_mask(self._sum, key, sign=-1 if client < dropout else 1)

    def _reconstruct(self, client: int, responses: Mapping[int, UnmaskShares], which: str) -> bytes:
        index = self._share_index
        shares = {index[holder]: getattr(reveal, which)[client] for holder, reveal in responses.items()}
        return shamir.combine(shares, threshold=self.session.threshold)


_ACCEPT: Mapping[ServerStage, Any] = {
    ServerStage.ADVERTISE: Server._accept_keys,
    ServerStage.SHARE: Server._accept_shares,
    ServerStage.MASK: Server._accept_vector,
    ServerStage.CONFIRM: Server._accept_confirmation,
    ServerStage.OPEN: Server._accept_reveal,
}
_NEXT: Mapping[ServerStage, Any] = {
    ServerStage.ADVERTISE: Server._send_keys,
    ServerStage.SHARE: Server._send_shares,
    ServerStage.MASK: Server._send_survivors,
    ServerStage.CONFIRM: Server._request_unmasking,
    ServerStage.OPEN: Server._compute_total,
}
