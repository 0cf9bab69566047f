"""A client of secure aggregation; it returns a message for each message, without input or output.

The stages follow Bonawitz et al. 2017, Figure 4, with the consistency check: advertise keys, share, mask, confirm,
open. There are two differences. Keys are always signed. A survivor sends the seed of its self mask, which the
server could reconstruct from shares in the same step. This saves the server most of its work.

Reference: Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth, *Practical Secure Aggregation for
Privacy-Preserving Machine Learning*, CCS 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import IntEnum

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlearn.privacy.secagg import crypto, shamir
from fedlearn.privacy.secagg.crypto import Identity
from fedlearn.privacy.secagg.errors import ProtocolError, reject_if
from fedlearn.privacy.secagg.messages import (
    ClientState,
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
    parties_of,
)
from fedlearn.privacy.secagg.shamir import SECRET_BYTES

VectorProvider = Callable[[Session], np.ndarray]


class ClientStage(IntEnum):
    """The last completed stage of a client; the next message must belong to the following stage."""

    NONE = 0
    ADVERTISED = 1
    SHARED = 2
    MASKED = 3
    CONFIRMED = 4
    DONE = 5


class Client:
    """One client of all rounds; it opens each round at most once.

    Args:
        identity: signing key of this client.
        registered: client -> public key of its identity, from outside the protocol; it includes this client.
        state: ``state`` of the object that handled the previous message; empty for a new client.
        min_threshold: smallest threshold, in parties, that this client accepts.
        max_colluders: number of other parties that may collude with a server that deviates from the protocol, >= 0.
        encoding: if present, digest of the settings with which this client encodes its vector. It refuses a session
            with other settings, because the noise of the other clients would differ.
        run: if present, this client takes part only in sessions whose run has this name, or this name, ``/`` and more.
        siblings: function that returns the states of the other clients of the same party, each at least as new as in
            its last response.

    Attributes:
        state: state until the next message. It is secret. The caller saves it before it sends the response, or a
            crash could lead to a second response.

    *Guarantees*, for all messages:

    - For each other client, it reveals a share of the seed or of the pairwise secret, never of both. This holds for
      all clients of its party together.
    - It opens a round at most once, and only if ``threshold`` parties signed the same survivors as itself.
    - Clients with the same registered key count as one party, and hold one share of each secret.
    - It never returns to an earlier round of a run.
    - A refused message does not change its state.
    - After a round it keeps no secret of it.
    """

    def __init__(
        self,
        identity: Identity,
        registered: Mapping[int, bytes],
        *,
        state: bytes = b"",
        min_threshold: int = 2,
        max_colluders: int = 0,
        encoding: bytes | None = None,
        run: str | None = None,
        siblings: Callable[[], Iterable[bytes]] = tuple,
    ) -> None:
        self.identity, self.registered, self.min_threshold = identity, registered, min_threshold
        self.max_colluders, self.encoding, self.run = max_colluders, encoding, run
        self._siblings = siblings
        self._state: ClientState = decode(state, ClientState) if state else ClientState()

    @property
    def state(self) -> bytes:
        """Return the state as bytes, for the next object."""
        return encode(self._state)

    def respond(self, message: bytes, vector: VectorProvider | None = None) -> bytes:
        """Return the response to a message of the server.

        Args:
            message: received bytes.
            vector: function that returns the vector to mask: ``length`` integers of ``dtype``. Only the stage ``mask``
                calls it.

        Raises:
            ProtocolError: The message is not acceptable; the state is unchanged.
        """
        request = decode(message, Session, KeyDirectory, ReceivedShares, Survivors, UnmaskRequest)
        if isinstance(request, Session):
            return self._advertise(request)
        if isinstance(request, KeyDirectory):
            return self._share(request)
        if isinstance(request, ReceivedShares):
            return self._mask(request, vector)
        return self._confirm(request) if isinstance(request, Survivors) else self._open(request)

    def discard_secrets(self) -> None:
        """Delete the secrets of an unfinished round; this client then cannot help to open it."""
        kept = ("run", "round", "confirmed", "survivors", "dropped")
        self._state = ClientState(stage=ClientStage.DONE, **{name: getattr(self._state, name) for name in kept})

    def _advertise(self, session: Session) -> bytes:
        state, me = self._state, self.identity.client
        self._accept_session(session)
        same_run = state.run == session.run
        reject_if(same_run and session.round < state.round, f"round {session.round} after round {state.round}")
        over = same_run and session.round == state.round and state.stage == ClientStage.DONE
        reject_if(over, f"round {session.round} is over: it is opened at most once")
        encryption_secret, mask_secret = crypto.generate_secret(), crypto.generate_secret()
        public = PublicKeys(
            session=crypto.digest(session),
            client=me,
            encryption_key=crypto.derive_public_key(encryption_secret),
            mask_key=crypto.derive_public_key(mask_secret),
        )
        signed = encode(self.identity.sign_keys(public))
        self._state = ClientState(
            run=session.run,
            round=session.round,
            stage=ClientStage.ADVERTISED,
            session=encode(session),
            encryption_secret=encryption_secret,
            mask_secret=mask_secret,
            seed=crypto.generate_secret(),
            roster={me: signed},
        )
        return signed

    def _accept_session(self, session: Session) -> None:
        """Raise `ProtocolError` unless the session is sound and this client accepts its run, parties and threshold."""
        session.validate()
        me, size, threshold = self.identity.client, session.num_parties(session.clients), session.threshold
        reject_if(me not in session.clients, f"client {me} is not in the cohort")
        belongs = self.run is None or session.run.partition(b"/")[0] == self.run.encode()
        reject_if(not belongs, "the session belongs to another run")
        agrees = self.encoding is None or session.encoding == self.encoding
        reject_if(not agrees, "the session has other settings of encoding and noise than this client")
        parties = tuple(session.party_of.values())
        is_same = parties == parties_of(session.clients, self.registered)
        reject_if(not is_same, "the parties of the session are not those of the registered keys")
        too_low = f"threshold {threshold}, expected at least {self.min_threshold} for this client"
        reject_if(threshold < self.min_threshold, too_low)
        expected = f"more than half of the parties and {self.max_colluders} colluding parties together"
        is_safe = 2 * threshold > size + self.max_colluders
        reject_if(not is_safe, f"threshold {threshold} of {size} parties, expected {expected}")

    def _share(self, roster: KeyDirectory) -> bytes:
        session, me = self._at(ClientStage.ADVERTISED, roster.session), self.identity.client
        reject_if(roster.keys.get(me) != self._state.roster[me], "the keys of this client were changed in transit")
        all_keys = verify_directory(session, roster.keys, self.registered)
        size, t = session.num_parties(session.clients), session.threshold
        secrets = [self._state.seed, self._state.mask_secret]
        seed_shares, key_shares = shamir.split(secrets, threshold=t, num_shares=size)
        both = {c: seed_shares[i - 1] + key_shares[i - 1] for c, i in session.share_indices().items()}
        private = crypto.private_key(self._state.encryption_secret)
        encrypted = {c: self._encrypt(private, keys, both[c]) for c, keys in all_keys.items() if c != me}
        self._state = replace(self._state, stage=ClientStage.SHARED, roster=roster.keys, shares={me: both[me]})
        return encode(EncryptedShares(session=roster.session, client=me, encrypted=encrypted))

    def _mask(self, inbox: ReceivedShares, vector: VectorProvider | None) -> bytes:
        session, me = self._at(ClientStage.SHARED, inbox.session), self.identity.client
        reject_if(inbox.client != me or me in inbox.encrypted, "these shares are meant for another client")
        reject_if(
            bool(set(inbox.encrypted) - set(self._state.roster)), "shares from a client that is not on the roster"
        )
        sharers = session.num_parties([*inbox.encrypted, me])
        reject_if(
            sharers < session.threshold, f"{sharers} parties have shared, fewer than threshold {session.threshold}"
        )
        all_keys = {c: crypto.decode_keys(data) for c, data in self._state.roster.items()}
        private = crypto.private_key(self._state.encryption_secret)
        shares = {c: self._decrypt(private, all_keys[c], encrypted) for c, encrypted in inbox.encrypted.items()}
        if vector is None:
            raise ProtocolError("this client has no vector to mask")
        masked = _checked_copy(vector(session), session)
        crypto.add_mask(masked, crypto.self_mask_key(self._state.seed, inbox.session, me), sign=1)
        private = crypto.private_key(self._state.mask_secret)
        for other in inbox.encrypted:
            key = crypto.pairwise_mask_key(private, all_keys[other].mask_key, inbox.session, me, other)
            crypto.add_mask(masked, key, sign=1 if me < other else -1)
        self._state = replace(
            self._state,
            stage=ClientStage.MASKED,
            encryption_secret=b"",
            mask_secret=b"",
            shares={**self._state.shares, **shares},
        )
        return encode(MaskedVector(session=inbox.session, client=me, vector=masked.tobytes()))

    def _confirm(self, shown: Survivors) -> bytes:
        session, me = self._at(ClientStage.MASKED, shown.session), self.identity.client
        survivors, dropped, sharers = set(shown.survivors), set(shown.dropped), set(self._state.shares)
        reject_if(
            bool(survivors & dropped),
            f"clients {sorted(survivors & dropped)} are listed as both survivors and dropouts",
        )
        reject_if(survivors | dropped != sharers, "survivors and dropouts are not the clients that have shared")
        reject_if(me not in survivors, "this client's own vector is not in the sum")
        size = session.num_parties(survivors)
        reject_if(size < session.threshold, f"survivors of {size} parties, fewer than threshold {session.threshold}")
        statement = (tuple(shown.survivors), tuple(shown.dropped))
        states = [decode(sibling, ClientState) for sibling in self._siblings() if sibling]
        others = {(s.survivors, s.dropped) for s in states if s.confirmed == shown.session} - {statement}
        reject_if(bool(others), "another client of this party has signed other survivors")
        signature = self.identity.sign(crypto.survivors_statement(shown))
        self._state = replace(
            self._state,
            stage=ClientStage.CONFIRMED,
            confirmed=shown.session,
            survivors=statement[0],
            dropped=statement[1],
        )
        return encode(Confirmation(session=shown.session, client=me, signature=signature))

    def _open(self, opening: UnmaskRequest) -> bytes:
        session, me = self._at(ClientStage.CONFIRMED, opening.session), self.identity.client
        agreed = (self._state.survivors, self._state.dropped)
        reject_if(
            (opening.survivors, opening.dropped) != agreed,
            "the survivors differ from the list that this client has signed",
        )
        self._check_signatures(opening, session)
        shares = self._state.shares
        reveal = UnmaskShares(
            session=opening.session,
            client=me,
            seed=self._state.seed,
            seed_shares={c: shares[c][:SECRET_BYTES] for c in opening.survivors},
            key_shares={c: shares[c][SECRET_BYTES:] for c in opening.dropped},
        )
        self.discard_secrets()
        return encode(reveal)

    def _check_signatures(self, opening: UnmaskRequest, session: Session) -> None:
        signers = set(opening.signatures)
        reject_if(bool(signers - set(opening.survivors)), "a signature under the survivors is not from a survivor")
        size = session.num_parties(signers)
        too_few = f"signatures of {size} parties under the survivors, fewer than threshold {session.threshold}"
        reject_if(size < session.threshold, too_few)
        shown = Survivors(session=opening.session, survivors=opening.survivors, dropped=opening.dropped)
        statement = crypto.survivors_statement(shown)
        for client, signature in opening.signatures.items():
            signer = f"client {client} under the survivors"
            crypto.verify(self.registered[client], signature, statement, signer=signer)

    def _at(self, stage: ClientStage, session: bytes) -> Session:
        """Return the session; raise `ProtocolError` if the message belongs to another session or stage."""
        now = ClientStage(self._state.stage)
        reject_if(
            now != stage,
            f"the message is for clients at stage {stage.name.lower()}, but this client's stage is {now.name.lower()}",
        )
        current: Session = decode(self._state.session, Session)
        reject_if(crypto.digest(current) != session, "the message belongs to another session")
        self._accept_session(current)  # a server could change registered keys and settings between two messages
        return current

    def _encrypt(self, private: X25519PrivateKey, receiver: PublicKeys, shares: bytes) -> bytes:
        context = _context(receiver.session, self.identity.client, receiver.client)
        return crypto.encrypt(crypto.agree_key(private, receiver.encryption_key, context), shares, context)

    def _decrypt(self, private: X25519PrivateKey, sender: PublicKeys, encrypted: bytes) -> bytes:
        context = _context(sender.session, sender.client, self.identity.client)
        key = crypto.agree_key(private, sender.encryption_key, context)
        shares = crypto.decrypt(key, encrypted, context, sender=sender.client)
        reject_if(len(shares) != 2 * SECRET_BYTES, f"the shares from client {sender.client} have a wrong size")
        return shares


def verify_directory(
    session: Session, directory: Mapping[int, bytes], registered: Mapping[int, bytes]
) -> dict[int, PublicKeys]:
    """Return the verified keys of a directory, by client.

    Raises:
        ProtocolError: Too few keys, a client outside the cohort, a signature of another identity, keys of another
            session, or a key that appears twice.
    """
    reject_if(bool(set(directory) - set(session.clients)), "a client on the roster is not in the cohort")
    size = session.num_parties(directory)
    reject_if(
        size < session.threshold, f"{size} parties have advertised keys, fewer than threshold {session.threshold}"
    )
    all_keys = {client: crypto.decode_keys(data) for client, data in directory.items()}
    expected = crypto.digest(session)
    for client, keys in all_keys.items():
        reject_if(keys.client != client, f"the keys of client {keys.client} are shown as those of client {client}")
        reject_if(keys.session != expected, f"the keys of client {client} are of another session")
        crypto.verify_keys(keys, registered)
    public = [key for keys in all_keys.values() for key in (keys.encryption_key, keys.mask_key)]
    reject_if(len(set(public)) < len(public), "a public key appears twice")
    return all_keys


def _context(session: bytes, sender: int, receiver: int) -> bytes:
    return b"shares" + session + sender.to_bytes(8, "big", signed=True) + receiver.to_bytes(8, "big", signed=True)


def _checked_copy(vector: np.ndarray, session: Session) -> np.ndarray:
    """Return a copy of the vector after a check of its shape and type."""
    fits = vector.shape == (session.length,) and vector.dtype == session.dtype
    if not fits:
        raise ValueError(f"the vector is {vector.dtype} {vector.shape}, expected {session.dtype} ({session.length},)")
    return vector.copy()
