"""A client of secure aggregation: a message in, a message out, no input or output of its own.

The stages are those of Bonawitz et al. 2017, Figure 4, with the consistency check: advertise keys, share, mask,
confirm, open. Departures: keys are always signed; a survivor also hands in the seed of its own mask itself, so that
the server needs no shares of it (it may open it then anyway, and is spared most of the work).

Reference: Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth, *Practical Secure Aggregation for
Privacy-Preserving Machine Learning*, CCS 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import IntEnum

import numpy as np

from fedlearn.privacy.secagg import keys as crypto
from fedlearn.privacy.secagg.errors import Refused, refuse
from fedlearn.privacy.secagg.keys import SECRET_BYTES, Identity
from fedlearn.privacy.secagg.records import (
    Confirmation,
    Inbox,
    Keys,
    Masked,
    Notes,
    Opening,
    Reveal,
    Roster,
    Session,
    Shares,
    Survivors,
    decode,
    encode,
)

Vector = Callable[[Session], np.ndarray]


class Stage(IntEnum):
    """What a client has done; the next message must be the one that follows."""

    NONE = 0
    ADVERTISED = 1
    SHARED = 2
    MASKED = 3
    CONFIRMED = 4
    OVER = 5


class Client:
    """One client; it outlives rounds, because it must know which of them it has helped to open.

    Args:
        identity: signs for this client.
        registered: client -> public key of its identity, agreed on outside the protocol; this client's own included.
        kept: ``kept`` of the object that handled the previous message, if it was another one.
        least: the smallest threshold that this client accepts: it is never in a sum of fewer.

    Attributes:
        kept: what must be remembered until the next message: secret, at this client only, and to be saved before the
            reply leaves, or a crash could make it answer twice.

    *Guarantees*: whatever arrives, a client gives away, for any other client of a session, a share of either the seed
    or the pairwise secret, never both; opens a round at most once, and only if at least ``threshold`` clients have
    signed the same survivors, itself among them; never goes back to an earlier round of a run. What it refuses does
    not change its state. After it has opened a round it keeps no secret of it.
    """

    def __init__(
        self, identity: Identity, registered: Mapping[int, bytes], *, kept: bytes = b"", least: int = 2
    ) -> None:
        self.identity, self.registered, self.least = identity, registered, least
        self._notes: Notes = decode(kept, Notes) if kept else Notes()

    @property
    def kept(self) -> bytes:
        """What to remember."""
        return encode(self._notes)

    def answer(self, message: bytes, vector: Vector | None = None) -> bytes:
        """The reply to any message of the server.

        Args:
            message: as it arrived.
            vector: makes this client's vector when it is time to mask it: ``length`` integers of ``dtype``.

        Raises:
            Refused: the message is not acceptable; the state is what it was.
        """
        request = decode(message, Session, Roster, Inbox, Survivors, Opening)
        if isinstance(request, Session):
            return self._advertise(request)
        if isinstance(request, Roster):
            return self._share(request)
        if isinstance(request, Inbox):
            return self._mask(request, vector)
        return self._confirm(request) if isinstance(request, Survivors) else self._open(request)

    def forget(self) -> None:
        """Drop the secrets of a round that was not finished; it cannot be opened any more with this client's help."""
        self._notes = Notes(run=self._notes.run, round=self._notes.round, stage=Stage.OVER)

    def _advertise(self, session: Session) -> bytes:
        session.check()
        notes, me = self._notes, self.identity.client
        refuse(me not in session.clients, f"client {me} is not in the cohort")
        refuse(
            session.threshold < self.least,
            f"threshold {session.threshold}: this client is in no sum of fewer than {self.least}",
        )
        same_run = notes.run == session.run
        refuse(same_run and session.round < notes.round, f"round {session.round} after round {notes.round}")
        over = same_run and session.round == notes.round and notes.stage == Stage.OVER
        refuse(over, f"round {session.round} is over: it is opened at most once")
        seal_secret, mask_secret = crypto.fresh_secret(), crypto.fresh_secret()
        public = Keys(
            session=crypto.digest(session),
            client=me,
            seal=crypto.public_of(seal_secret),
            mask=crypto.public_of(mask_secret),
        )
        signed = encode(self.identity.signed(public))
        self._notes = Notes(
            run=session.run,
            round=session.round,
            stage=Stage.ADVERTISED,
            session=encode(session),
            seal_secret=seal_secret,
            mask_secret=mask_secret,
            seed=crypto.fresh_secret(),
            roster={me: signed},
        )
        return signed

    def _share(self, roster: Roster) -> bytes:
        session, me = self._at(Stage.ADVERTISED, roster.session), self.identity.client
        refuse(roster.keys.get(me) != self._notes.roster[me], "the keys of this client were changed on their way")
        everyone = checked_roster(session, roster.keys, self.registered)
        size, t = len(session.clients), session.threshold
        seed_shares = crypto.split(self._notes.seed, threshold=t, num_shares=size)
        key_shares = crypto.split(self._notes.mask_secret, threshold=t, num_shares=size)
        both = {c: seed_shares[i] + key_shares[i] for i, c in enumerate(session.clients)}
        sealed = {c: self._seal(keys, both[c]) for c, keys in everyone.items() if c != me}
        self._notes = replace(self._notes, stage=Stage.SHARED, roster=roster.keys, shares={me: both[me]})
        return encode(Shares(session=roster.session, client=me, sealed=sealed))

    def _mask(self, inbox: Inbox, vector: Vector | None) -> bytes:
        session, me = self._at(Stage.SHARED, inbox.session), self.identity.client
        refuse(inbox.client != me or me in inbox.sealed, "these shares are meant for another client")
        refuse(bool(set(inbox.sealed) - set(self._notes.roster)), "shares from a client that is not on the roster")
        sharers = len(inbox.sealed) + 1
        refuse(sharers < session.threshold, f"{sharers} clients have shared, fewer than threshold {session.threshold}")
        everyone = {c: decode(data, Keys) for c, data in self._notes.roster.items()}
        shares = {c: self._unseal(everyone[c], sealed) for c, sealed in inbox.sealed.items()}
        if vector is None:
            raise Refused("there is nothing to mask")
        masked = _checked(vector(session), session)
        crypto.add_mask(masked, crypto.own_key(self._notes.seed, inbox.session, me), sign=1)
        for other in inbox.sealed:
            key = crypto.pair_key(self._notes.mask_secret, everyone[other].mask, inbox.session, me, other)
            crypto.add_mask(masked, key, sign=1 if me < other else -1)
        self._notes = replace(
            self._notes,
            stage=Stage.MASKED,
            seal_secret=b"",
            mask_secret=b"",
            shares={**self._notes.shares, **shares},
        )
        return encode(Masked(session=inbox.session, client=me, vector=masked.tobytes()))

    def _confirm(self, shown: Survivors) -> bytes:
        session, me = self._at(Stage.MASKED, shown.session), self.identity.client
        survivors, dropped, sharers = set(shown.survivors), set(shown.dropped), set(self._notes.shares)
        refuse(bool(survivors & dropped), f"clients {sorted(survivors & dropped)} are said to be both there and gone")
        refuse(survivors | dropped != sharers, "survivors and dropped clients are not those who shared")
        refuse(me not in survivors, "this client's own vector is not in the sum")
        few = f"{len(survivors)} survivors, fewer than threshold {session.threshold}"
        refuse(len(survivors) < session.threshold, few)
        signature = self.identity.sign(crypto.statement(shown))
        self._notes = replace(
            self._notes, stage=Stage.CONFIRMED, survivors=tuple(shown.survivors), dropped=tuple(shown.dropped)
        )
        return encode(Confirmation(session=shown.session, client=me, signature=signature))

    def _open(self, opening: Opening) -> bytes:
        session, me = self._at(Stage.CONFIRMED, opening.session), self.identity.client
        agreed = (self._notes.survivors, self._notes.dropped)
        refuse(
            (opening.survivors, opening.dropped) != agreed, "the survivors are not those that this client has signed"
        )
        self._check_signatures(opening, session)
        shares = self._notes.shares
        reveal = Reveal(
            session=opening.session,
            client=me,
            seed=self._notes.seed,
            seed_shares={c: shares[c][:SECRET_BYTES] for c in opening.survivors},
            key_shares={c: shares[c][SECRET_BYTES:] for c in opening.dropped},
        )
        self.forget()
        return encode(reveal)

    def _check_signatures(self, opening: Opening, session: Session) -> None:
        signers = set(opening.signatures)
        refuse(bool(signers - set(opening.survivors)), "a signature under the survivors is from someone else")
        few = f"{len(signers)} signatures under the survivors, fewer than threshold {session.threshold}"
        refuse(len(signers) < session.threshold, few)
        shown = Survivors(session=opening.session, survivors=opening.survivors, dropped=opening.dropped)
        for client, signature in opening.signatures.items():
            whose = f"client {client} under the survivors"
            crypto.verify(self.registered[client], signature, crypto.statement(shown), whose=whose)

    def _at(self, stage: Stage, session: bytes) -> Session:
        """The session, if the message belongs to it and to this stage of it."""
        now = Stage(self._notes.stage)
        refuse(
            now != stage,
            f"a message for a client that has {stage.name.lower()}; this one's stage is {now.name.lower()}",
        )
        current: Session = decode(self._notes.session, Session)
        refuse(crypto.digest(current) != session, "a message of another session")
        return current

    def _seal(self, receiver: Keys, shares: bytes) -> bytes:
        context = _context(receiver.session, self.identity.client, receiver.client)
        return crypto.seal(crypto.agree(self._notes.seal_secret, receiver.seal, context), shares, context)

    def _unseal(self, sender: Keys, sealed: bytes) -> bytes:
        context = _context(sender.session, sender.client, self.identity.client)
        key = crypto.agree(self._notes.seal_secret, sender.seal, context)
        shares = crypto.unseal(key, sealed, context, sender=sender.client)
        refuse(len(shares) != 2 * SECRET_BYTES, f"the shares from client {sender.client} have a wrong size")
        return shares


def checked_roster(session: Session, roster: Mapping[int, bytes], registered: Mapping[int, bytes]) -> dict[int, Keys]:
    """The keys on a roster, by client.

    Raises:
        Refused: too few, someone from outside the cohort, a signature that is not the registered identity's, keys of
            another session, or the same key twice.
    """
    refuse(bool(set(roster) - set(session.clients)), "a client on the roster is not in the cohort")
    few = f"{len(roster)} clients have advertised keys, fewer than threshold {session.threshold}"
    refuse(len(roster) < session.threshold, few)
    everyone: dict[int, Keys] = {client: decode(data, Keys) for client, data in roster.items()}
    for client, keys in everyone.items():
        refuse(keys.client != client, f"the keys of client {keys.client} are shown as those of client {client}")
        refuse(keys.session != crypto.digest(session), f"the keys of client {client} are of another session")
        crypto.verify_keys(keys, registered)
    public = [key for keys in everyone.values() for key in (keys.seal, keys.mask)]
    refuse(len(set(public)) < len(public), "a public key appears twice")
    return everyone


def _context(session: bytes, sender: int, receiver: int) -> bytes:
    return b"shares" + session + sender.to_bytes(8, "big", signed=True) + receiver.to_bytes(8, "big", signed=True)


def _checked(vector: np.ndarray, session: Session) -> np.ndarray:
    """A copy of the vector to be masked."""
    right = vector.shape == (session.length,) and vector.dtype == session.dtype
    if not right:
        raise ValueError(f"a vector of {vector.dtype} {vector.shape}, where {session.dtype} ({session.length},) is due")
    return vector.copy()
