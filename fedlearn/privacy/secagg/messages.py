"""Messages of the secure aggregation protocol: frozen records with one canonical encoding.

A message starts with ``fsa``, the protocol version and the record type (one byte each). A CBOR array with the fields in
order follows, in canonical form. `decode` accepts only bytes that `encode` produces, so that a signature covers exactly
the record that was read.

Reference: Bormann, Hoffman, *Concise Binary Object Representation (CBOR)*, RFC 8949, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any, NoReturn

import cbor2
import numpy as np

from fedlearn.privacy.secagg.errors import ProtocolError, reject_if

MAGIC, VERSION = b"fsa", 3
HEADER_BYTES = 5  # magic, version, record type
MAX_MESSAGE_BYTES = 1 << 24  # except for masked vectors; a cohort of 10,000 clients needs 2.5 MB
MAX_DEPTH = 2  # the array of fields, and a list or mapping in it
ARRAY_HEAD = 0x80  # first byte of an array of less than 24 items, together with their number


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """Settings of one attempt at one round; each signature and each ciphertext is bound to them.

    Attributes:
        run: name of the run.
        round: round number, >= 1; within a run it never decreases.
        nonce: 16 random bytes, different for each attempt.
        clients: the cohort, ascending.
        threshold: least number of parties whose sum may be opened; more than half of the parties of the cohort.
        length: number of integers in a vector.
        encoding: digest of the settings with which all clients encode their vectors, noise included; may be empty.
        parties: party of each client, as `parties_of` returns them; empty: each client is a party of its own.
        bits: 16, 32 or 64; integers are added modulo ``2**bits``.
    """

    run: bytes
    round: int
    nonce: bytes
    clients: tuple[int, ...]
    threshold: int
    length: int
    bits: int = 32
    encoding: bytes = b""
    parties: tuple[int, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        """The type of vectors: unsigned little-endian integers, whose arithmetic wraps."""
        return np.dtype(f"<u{self.bits // 8}")

    def validate(self) -> None:
        """Raise `ProtocolError` unless the settings are sound.

        With a threshold of half the cohort or less, a server could let two halves open different sums.
        """
        reject_if(
            list(self.clients) != sorted(set(self.clients)),
            "the clients of the cohort are not distinct and in ascending order",
        )
        wrong = len(self.parties) not in (0, len(self.clients)) or not set(self.parties) <= set(self.clients)
        reject_if(wrong, "the session does not name a party for each client of the cohort")
        size = self.num_parties(self.clients)
        reject_if(
            size < 2, f"a cohort of {size} parties, expected at least 2: the sum would be the vector of one party"
        )
        reject_if(2 * self.threshold <= size, f"threshold {self.threshold} of {size} parties, expected more than half")
        reject_if(self.threshold > size, f"threshold {self.threshold} of {size} parties, expected at most {size}")
        reject_if(self.bits not in (16, 32, 64), f"modulus 2**{self.bits}, expected 16, 32 or 64 bits")
        reject_if(not 1 <= self.length <= 2**31, f"vectors of {self.length} numbers, expected 1 to 2**31")
        reject_if(self.round < 1 or len(self.nonce) != 16, "expected a round number >= 1 and a nonce of 16 bytes")

    @property
    def party_of(self) -> dict[int, int]:
        """The party of each client."""
        return dict(zip(self.clients, self.parties or self.clients, strict=True))

    def num_parties(self, clients: Iterable[int]) -> int:
        """Return the number of distinct parties of these clients."""
        party_of = self.party_of
        return len({party_of[client] for client in clients})

    def share_indices(self) -> dict[int, int]:
        """Return the point of each client's shares on the sharing polynomials, >= 1, equal for clients of one party."""
        index = {party: i for i, party in enumerate(sorted(set(self.party_of.values())), 1)}
        return {client: index[party] for client, party in self.party_of.items()}


def parties_of(clients: Sequence[int], registered: Mapping[int, bytes]) -> tuple[int, ...]:
    """Return the party of each client. Clients with the same registered key are one party, named by its first client.

    >>> parties_of([0, 1, 2], {0: b"north", 1: b"south", 2: b"north"})
    (0, 1, 0)

    Raises:
        ProtocolError: A client has no registered key.
    """
    missing = [client for client in clients if client not in registered]
    reject_if(bool(missing), f"no identity is registered for client {missing[0] if missing else None}")
    first = {registered[client]: client for client in sorted(clients, reverse=True)}
    return tuple(first[registered[client]] for client in clients)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicKeys:
    """A client's two public keys for one session, signed with its registered identity.

    Attributes:
        session: digest of the session.
        client: id of the client.
        encryption_key: X25519 key for the encryption of shares.
        mask_key: X25519 key for pairwise masks.
        signature: Ed25519 signature of the fields above.
    """

    session: bytes
    client: int
    encryption_key: bytes
    mask_key: bytes
    signature: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyDirectory:
    """The signed keys of all clients that advertised keys: client -> encoded `PublicKeys`."""

    session: bytes
    keys: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncryptedShares:
    """The encrypted shares from one client: receiver -> ciphertext."""

    session: bytes
    client: int
    encrypted: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivedShares:
    """The encrypted shares for one client: sender -> ciphertext. Senders and receiver mask vectors next."""

    session: bytes
    client: int
    encrypted: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedVector:
    """The masked vector of one client, as little-endian bytes."""

    session: bytes
    client: int
    vector: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Survivors:
    """Clients with a masked vector, and clients that dropped out after the stage ``share``; each survivor signs it."""

    session: bytes
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmation:
    """The signature of one client over the `Survivors` that it received."""

    session: bytes
    client: int
    signature: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class UnmaskRequest:
    """The request to open the sum, with the signatures over its survivors: client -> signature."""

    session: bytes
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]
    signatures: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnmaskShares:
    """The secrets that one survivor reveals.

    Attributes:
        seed: seed of its self mask.
        seed_shares: survivor -> share of the seed of that survivor's self mask.
        key_shares: dropped client -> share of the secret of its pairwise masks.
    """

    session: bytes
    client: int
    seed: bytes
    seed_shares: Mapping[int, bytes]
    key_shares: Mapping[int, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientState:
    """The state of a client between messages: secret during a round, and without any secret after it.

    Attributes:
        run, round, stage: position in the protocol; see `Client`.
        session: encoded `Session`, empty after the round.
        encryption_secret, mask_secret, seed: secrets; each is dropped after its last use.
        roster: keys of the round: client -> encoded `PublicKeys`.
        shares: sender -> the two shares from this sender, concatenated.
        confirmed: digest of the session in which this client signed the statement about survivors; kept after the
            round, with the statement.
        survivors, dropped: the clients in this statement.
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
    confirmed: bytes = b""
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
    """Return the canonical bytes of a record."""
    header = MAGIC + bytes((VERSION, RECORD_TYPES.index(type(record)) + 1))
    values = [getattr(record, each.name) for each in fields(record)]
    return header + cbor2.dumps(values, canonical=True, default=_encode_integer)


def decode(data: bytes, *expected: type) -> Any:
    """Return the record that the bytes encode.

    Args:
        data: output of `encode`, or untrusted bytes.
        expected: accepted record types.

    Raises:
        ProtocolError: The bytes are not the canonical encoding of a record of an expected type.
    """
    record_type = _record_type(data, expected)
    values = _decode_values(data, record_type)
    for each, value in zip(fields(record_type), values, strict=True):
        wrong = not TYPE_CHECKS[str(each.type)](value)
        reject_if(wrong, f"{record_type.__name__}.{each.name} is not of type {each.type}")
    plain = {each.name: _frozen(value) for each, value in zip(fields(record_type), values, strict=True)}
    record = record_type(**plain)
    reject_if(encode(record) != data, f"{record_type.__name__} is not in canonical form")
    return record


def _encode_integer(encoder: cbor2.CBOREncoder, value: Any) -> None:
    encoder.encode_int(index(value))  # NumPy's integers too


def _frozen(value: Any) -> Any:
    """Return the value of a field: a tuple for a list, and a mapping in the order of its keys."""
    if isinstance(value, dict):
        return dict(sorted(value.items()))  # in CBOR, negative keys follow positive ones
    return tuple(value) if isinstance(value, list) else value


def _record_type(data: bytes, expected: Sequence[type]) -> type:
    reject_if(data[:3] != MAGIC or len(data) <= HEADER_BYTES, "not a message of secure aggregation")
    reject_if(data[3] != VERSION, f"protocol version {data[3]}, expected {VERSION}")
    record_type = dict(enumerate(RECORD_TYPES, 1)).get(data[4])
    if record_type is None or record_type not in expected:
        names = " or ".join(each.__name__ for each in expected)
        raise ProtocolError(f"{record_type.__name__ if record_type else 'an unknown record type'}, expected {names}")
    return record_type


def _decode_values(data: bytes, record_type: type) -> list[Any]:
    """Decode the fields in bounded memory: the first byte fixes their number, and nothing is nested deeper."""
    name, num_fields = record_type.__name__, len(fields(record_type))
    too_long = len(data) > MAX_MESSAGE_BYTES and record_type is not MaskedVector
    reject_if(too_long, f"{name} has {len(data)} bytes, expected at most {MAX_MESSAGE_BYTES}")
    reject_if(data[HEADER_BYTES] != ARRAY_HEAD | num_fields, f"{name} is not an array of {num_fields} fields")
    try:
        values: list[Any] = cbor2.loads(data[HEADER_BYTES:], max_depth=MAX_DEPTH, semantic_decoders=_NoTags())
    except (cbor2.CBORDecodeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"{name} cannot be decoded: {error}") from None
    return values


class _NoTags(dict[int, Any]):
    """Mapping that refuses all CBOR tags, because tags create dates, patterns, e-mails and cyclic values."""

    def __missing__(self, tag: int) -> NoReturn:
        raise cbor2.CBORDecodeError(f"tag {tag} is not allowed")


def _is_int64(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_bytes(value: Any) -> bool:
    return type(value) is bytes


TYPE_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "int": _is_int64,
    "bytes": _is_bytes,
    "tuple[int, ...]": lambda value: type(value) is list and all(map(_is_int64, value)),
    "Mapping[int, bytes]": lambda value: (
        type(value) is dict and all(map(_is_int64, value)) and all(map(_is_bytes, value.values()))
    ),
}
