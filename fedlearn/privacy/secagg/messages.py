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

from fedlearn.privacy.secagg.errors import ProtocolError, reject_if

MAGIC, VERSION = b"fsa", 1
INT64, UINT32 = struct.Struct(">q"), struct.Struct(">I")


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

    def validate(self) -> None:
        """Raise `Refused` unless the settings are sound.

        With a threshold of half the cohort or less a server could have two halves each open a sum of its own.
        """
        size = len(self.clients)
        reject_if(
            list(self.clients) != sorted(set(self.clients)), "the cohort is not in ascending order, each client once"
        )
        reject_if(size < 2, f"a cohort of {size}: its sum would be one client's vector")
        reject_if(2 * self.threshold <= size, f"threshold {self.threshold} of {size}: it must be more than half")
        reject_if(self.threshold > size, f"threshold {self.threshold} of {size}: it can never be reached")
        reject_if(self.bits not in (16, 32, 64), f"modulus 2**{self.bits}: only 16, 32 and 64 bits wrap by themselves")
        reject_if(not 1 <= self.length <= 2**31, f"vectors of {self.length} numbers")
        reject_if(self.round < 1 or len(self.nonce) != 16, "no round number >= 1, or no nonce of 16 bytes")

    def share_index(self, client: int) -> int:
        """Where a client's shares lie on the sharing polynomials, from 1."""
        return self.clients.index(client) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicKeys:
    """A client's two public keys for one session, signed with its registered identity.

    Attributes:
        session: digest of the session.
        client: whose.
        encryption_key: X25519 key that others encrypt shares to.
        mask_key: X25519 key that pairwise masks come from.
        signature: Ed25519, over all of the above.
    """

    session: bytes
    client: int
    encryption_key: bytes
    mask_key: bytes
    signature: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyDirectory:
    """The signed keys of all who advertised: client -> encoded `PublicKeys`."""

    session: bytes
    keys: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncryptedShares:
    """A client's sealed shares: receiver -> ciphertext."""

    session: bytes
    client: int
    encrypted: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedShares:
    """The sealed shares for one client: sender -> ciphertext. Senders and receiver are those who will mask."""

    session: bytes
    client: int
    encrypted: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedVector:
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
class UnmaskRequest:
    """The request to open the sum, with the signatures under its survivors: client -> signature."""

    session: bytes
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]
    signatures: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnmaskShares:
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
class ClientState:
    """What a client keeps between messages: secret until the round is over, then only which round it was.

    Attributes:
        run, round, stage: where it stands; see `Client`.
        session: encoded, empty after the round.
        seal_secret, mask_secret, seed: its secrets; each is dropped when it is not needed any more.
        roster: of the round: client -> encoded `PublicKeys`.
        shares: sender -> the two shares received from it, one after the other.
        survivors, dropped: what it has signed.
    """

    run: bytes = b""
    round: int = 0
    stage: int = 0
    session: bytes = b""
    encryption_secret: bytes = b""
    mask_secret: bytes = b""
    seed: bytes = b""
    roster: Mapping[int, bytes] = field(default_factory=dict)
    shares: Mapping[int, bytes] = field(default_factory=dict)
    survivors: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()


RECORD_TYPES: tuple[type, ...] = (
    Session,
    PublicKeys,
    KeyDirectory,
    EncryptedShares,
    ReceivedShares,
    MaskedVector,
    Survivors,
    Confirmation,
    UnmaskRequest,
    UnmaskShares,
    ClientState,
)


def encode(record: Any) -> bytes:
    """The canonical bytes of a record."""
    parts = [MAGIC, bytes((VERSION, RECORD_TYPES.index(type(record)) + 1))]
    for each in fields(record):
        parts += WRITERS[str(each.type)](getattr(record, each.name))
    return b"".join(parts)


def decode(data: bytes, *kinds: type) -> Any:
    """The record that ``data`` encodes.

    Args:
        data: from `encode`, or from someone who claims so.
        kinds: of record that are expected here.

    Raises:
        Refused: the bytes are not the canonical encoding of a record of one of these kinds.
    """
    reject_if(data[:3] != MAGIC or len(data) < 5, "not a message of secure aggregation")
    reject_if(data[3] != VERSION, f"version {data[3]} of the protocol, where {VERSION} is spoken")
    kind = RECORD_TYPES[data[4] - 1] if 1 <= data[4] <= len(RECORD_TYPES) else None
    names = " or ".join(each.__name__ for each in kinds)
    if kind not in kinds:
        raise ProtocolError(f"{kind.__name__ if kind else 'something unknown'} where {names} was expected")
    reader = _Reader(data)
    try:
        record = kind(**{each.name: READERS[str(each.type)](reader) for each in fields(kind)})
    except struct.error:
        raise ProtocolError(f"{kind.__name__} ends too early") from None
    reject_if(reader.at != len(data), f"{kind.__name__} has bytes after its end")
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
        size = self.take(UINT32)
        reject_if(self.at + size > len(self.data), "a field is longer than its message")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def numbers(self) -> tuple[int, ...]:
        """The next list."""
        return tuple(self.take(INT64) for _ in range(self.take(UINT32)))

    def mapping(self) -> dict[int, bytes]:
        """The next mapping."""
        pairs = [(self.take(INT64), self.raw()) for _ in range(self.take(UINT32))]
        keys = [key for key, _ in pairs]
        reject_if(keys != sorted(set(keys)), "a mapping does not ascend, or names a client twice")
        return dict(pairs)


def _raw(value: bytes) -> list[bytes]:
    return [UINT32.pack(len(value)), value]


def _mapping(value: Mapping[int, bytes]) -> list[bytes]:
    pairs = [part for key in sorted(value) for part in (INT64.pack(key), *_raw(value[key]))]
    return [UINT32.pack(len(value)), *pairs]


WRITERS: Mapping[str, Any] = {
    "int": lambda value: [INT64.pack(value)],
    "bytes": _raw,
    "tuple[int, ...]": lambda value: [UINT32.pack(len(value)), *map(INT64.pack, value)],
    "Mapping[int, bytes]": _mapping,
}
READERS: Mapping[str, Any] = {
    "int": lambda reader: reader.take(INT64),
    "bytes": _Reader.raw,
    "tuple[int, ...]": _Reader.numbers,
    "Mapping[int, bytes]": _Reader.mapping,
}
