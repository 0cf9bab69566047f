"""What clients and server say to each other: frozen records with one canonical encoding.

A record is ``fsa``, a version, its kind, then its fields in order. Whole numbers have eight bytes, byte strings four
bytes of length before them, lists and mappings four bytes of count; mappings ascend strictly by key. There is one
encoding of a record and `decode` takes no other, so that what was signed is what was read.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from fedlearn.privacy.secagg.errors import Refused, refuse

MAGIC, VERSION = b"fsa", 1
NUMBER, COUNT = struct.Struct(">q"), struct.Struct(">I")


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What all participants of one attempt at one round agree on; everything they sign or encrypt is bound to it.

    Attributes:
        run: names the run.
        round: from 1; within a run rounds only go forward.
        nonce: 16 random bytes that tell attempts at the same round apart.
        clients: the cohort, ascending.
        threshold: the fewest clients whose sum may be opened; more than half of the cohort.
        length: numbers in a vector.
        bits: the numbers are added modulo ``2**bits``; 16, 32 or 64.
    """

    run: bytes
    round: int
    nonce: bytes
    clients: tuple[int, ...]
    threshold: int
    length: int
    bits: int = 32

    @property
    def dtype(self) -> np.dtype:
        """Of vectors: unsigned little-endian integers, whose arithmetic wraps as the protocol wants it."""
        return np.dtype(f"<u{self.bits // 8}")

    def check(self) -> None:
        """Raise `Refused` unless the settings are sound.

        With a threshold of half the cohort or less a server could have two halves each open a sum of its own.
        """
        size = len(self.clients)
        refuse(
            list(self.clients) != sorted(set(self.clients)), "the cohort is not in ascending order, each client once"
        )
        refuse(size < 2, f"a cohort of {size}: its sum would be one client's vector")
        refuse(2 * self.threshold <= size, f"threshold {self.threshold} of {size}: it must be more than half")
        refuse(self.threshold > size, f"threshold {self.threshold} of {size}: it can never be reached")
        refuse(self.bits not in (16, 32, 64), f"modulus 2**{self.bits}: only 16, 32 and 64 bits wrap by themselves")
        refuse(not 1 <= self.length <= 2**31, f"vectors of {self.length} numbers")
        refuse(self.round < 1 or len(self.nonce) != 16, "no round number >= 1, or no nonce of 16 bytes")

    def point(self, client: int) -> int:
        """Where a client's shares lie on the sharing polynomials, from 1."""
        return self.clients.index(client) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """A client's two public keys for one session, signed with its registered identity.

    Attributes:
        session: digest of the session.
        client: whose.
        seal: X25519 key that others encrypt shares to.
        mask: X25519 key that pairwise masks come from.
        signature: Ed25519, over all of the above.
    """

    session: bytes
    client: int
    seal: bytes
    mask: bytes
    signature: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roster:
    """The signed keys of all who advertised: client -> encoded `Keys`."""

    session: bytes
    keys: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """A client's sealed shares: receiver -> ciphertext."""

    session: bytes
    client: int
    sealed: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inbox:
    """The sealed shares for one client: sender -> ciphertext. Senders and receiver are those who will mask."""

    session: bytes
    client: int
    sealed: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Masked:
    """A client's masked vector, little-endian."""

    session: bytes
    client: int
    vector: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Survivors:
    """Whose masked vectors the server has, and whose not, of those who shared: to be signed by every survivor."""

    session: bytes
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmation:
    """A client's signature under the `Survivors` that it was shown."""

    session: bytes
    client: int
    signature: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """The request to open the sum, with the signatures under its survivors: client -> signature."""

    session: bytes
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]
    signatures: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reveal:
    """What one survivor gives away.

    Attributes:
        seed: of its own mask.
        seed_shares: survivor -> share of the seed of that survivor's own mask.
        key_shares: dropped client -> share of the secret of its pairwise masks.
    """

    session: bytes
    client: int
    seed: bytes
    seed_shares: Mapping[int, bytes]
    key_shares: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Notes:
    """What a client keeps between messages: secret until the round is over, then only which round it was.

    Attributes:
        run, round, stage: where it stands; see `Client`.
        session: encoded, empty after the round.
        seal_secret, mask_secret, seed: its secrets; each is dropped when it is not needed any more.
        roster: of the round: client -> encoded `Keys`.
        shares: sender -> the two shares received from it, one after the other.
        survivors, dropped: what it has signed.
    """

    run: bytes = b""
    round: int = 0
    stage: int = 0
    session: bytes = b""
    seal_secret: bytes = b""
    mask_secret: bytes = b""
    seed: bytes = b""
    roster: Mapping[int, bytes] = field(default_factory=dict)
    shares: Mapping[int, bytes] = field(default_factory=dict)
    survivors: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


KINDS: tuple[type, ...] = (
    Session,
    Keys,
    Roster,
    Shares,
    Inbox,
    Masked,
    Survivors,
    Confirmation,
    Opening,
    Reveal,
    Notes,
)


def encode(record: Any) -> bytes:
    """The canonical bytes of a record."""
    parts = [MAGIC, bytes((VERSION, KINDS.index(type(record)) + 1))]
    for each in fields(record):
        parts += WRITE[str(each.type)](getattr(record, each.name))
    return b"".join(parts)


def decode(data: bytes, *kinds: type) -> Any:
    """The record that ``data`` encodes.

    Args:
        data: from `encode`, or from someone who claims so.
        kinds: of record that are expected here.

    Raises:
        Refused: the bytes are not the canonical encoding of a record of one of these kinds.
    """
    refuse(data[:3] != MAGIC or len(data) < 5, "not a message of secure aggregation")
    refuse(data[3] != VERSION, f"version {data[3]} of the protocol, where {VERSION} is spoken")
    kind = KINDS[data[4] - 1] if 1 <= data[4] <= len(KINDS) else None
    names = " or ".join(each.__name__ for each in kinds)
    if kind not in kinds:
        raise Refused(f"{kind.__name__ if kind else 'something unknown'} where {names} was expected")
    reader = _Reader(data)
    try:
        record = kind(**{each.name: READ[str(each.type)](reader) for each in fields(kind)})
    except struct.error:
        raise Refused(f"{kind.__name__} ends too early") from None
    refuse(reader.at != len(data), f"{kind.__name__} has bytes after its end")
    return record


class _Reader:
    """A position in a message."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 5

    def take(self, form: struct.Struct) -> int:
        """The next number."""
        (number,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return int(number)

    def raw(self) -> bytes:
        """The next byte string."""
        size = self.take(COUNT)
        refuse(self.at + size > len(self.data), "a field is longer than its message")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def numbers(self) -> tuple[int, ...]:
        """The next list."""
        return tuple(self.take(NUMBER) for _ in range(self.take(COUNT)))

    def mapping(self) -> dict[int, bytes]:
        """The next mapping."""
        pairs = [(self.take(NUMBER), self.raw()) for _ in range(self.take(COUNT))]
        keys = [key for key, _ in pairs]
        refuse(keys != sorted(set(keys)), "a mapping does not ascend, or names a client twice")
        return dict(pairs)


def _raw(value: bytes) -> list[bytes]:
    return [COUNT.pack(len(value)), value]


def _mapping(value: Mapping[int, bytes]) -> list[bytes]:
    pairs = [part for key in sorted(value) for part in (NUMBER.pack(key), *_raw(value[key]))]
    return [COUNT.pack(len(value)), *pairs]


WRITE: Mapping[str, Any] = {
    "int": lambda value: [NUMBER.pack(value)],
    "bytes": _raw,
    "tuple[int, ...]": lambda value: [COUNT.pack(len(value)), *map(NUMBER.pack, value)],
    "Mapping[int, bytes]": _mapping,
}
READ: Mapping[str, Any] = {
    "int": lambda reader: reader.take(NUMBER),
    "bytes": _Reader.raw,
    "tuple[int, ...]": _Reader.numbers,
    "Mapping[int, bytes]": _Reader.mapping,
}
