"""Cryptography of the protocol; the package `cryptography` provides all primitives but Shamir's scheme.

- X25519 for key agreement, HKDF-SHA256 for derived keys, Ed25519 for signatures.
- ChaCha20-Poly1305 for encrypted shares, AES-256 in counter mode for masks.
- Shamir's scheme over GF(2^128) for shares of 16-byte secrets, see `fedlearn.privacy.secagg.shamir`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlearn.privacy.secagg.errors import ProtocolError, reject_if
from fedlearn.privacy.secagg.messages import VERSION, PublicKeys, Session, Survivors, decode, encode
from fedlearn.privacy.secagg.shamir import SECRET_BYTES

CHUNK_BYTES = 1 << 19  # bytes of key stream at a time, which fit the cache
ZEROS = memoryview(bytes(CHUNK_BYTES))
BLOCK_BYTES = 16  # block of AES
MAX_CACHED = 2**14  # verified signatures and decoded keys that are kept; each has less than 1 kB
MAX_KEY_BYTES = 512  # bytes of encoded public keys, which have about 200


@dataclass(frozen=True, slots=True)
class Identity:
    """Long-lived signing key of a client; all parties register its public key before the protocol."""

    client: int
    secret: bytes = field(repr=False, default_factory=lambda: Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def public_key(self) -> bytes:
        """Return the public key, 32 bytes, for registration."""
        return Ed25519PrivateKey.from_private_bytes(self.secret).public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Return the signature of a message, 64 bytes."""
        return Ed25519PrivateKey.from_private_bytes(self.secret).sign(message)

    def sign_keys(self, keys: PublicKeys) -> PublicKeys:
        """Return the keys with the signature of this identity."""
        return replace(keys, signature=self.sign(encode(replace(keys, signature=b""))))


def verify(public_key: bytes, signature: bytes, message: bytes, *, signer: str) -> None:
    """Raise `ProtocolError` unless the key signed the message.

    All clients of a process verify the same signatures. So the digests of valid ones are kept.
    """
    known = sha256(b"".join([len(public_key).to_bytes(8), public_key, len(signature).to_bytes(8), signature, message]))
    if known.digest() in _verified:
        return
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise ProtocolError(f"the signature of {signer} is not valid") from None
    if len(_verified) >= MAX_CACHED:
        _verified.clear()
    _verified.add(known.digest())


_verified: set[bytes] = set()  # digests of public keys with their valid signatures and messages


def verify_keys(keys: PublicKeys, registered: Mapping[int, bytes]) -> None:
    """Raise `ProtocolError` unless the registered identity of their client signed the keys."""
    reject_if(keys.client not in registered, f"no identity is registered for client {keys.client}")
    sizes = map(len, (keys.session, keys.encryption_key, keys.mask_key, keys.signature))
    reject_if(sum(sizes) > MAX_KEY_BYTES, f"the keys of client {keys.client} have a wrong size")
    signer = f"client {keys.client} under its keys"
    verify(registered[keys.client], keys.signature, _unsigned_bytes(keys), signer=signer)


@lru_cache(maxsize=MAX_CACHED)
def _unsigned_bytes(keys: PublicKeys) -> bytes:
    """Return the bytes that the client of these keys signs."""
    return encode(replace(keys, signature=b""))


def decode_keys(data: bytes) -> PublicKeys:
    """Return the public keys that the bytes encode.

    Raises:
        ProtocolError: The bytes are not the canonical encoding of public keys.
    """
    reject_if(len(data) > MAX_KEY_BYTES, f"public keys have {len(data)} bytes, expected at most {MAX_KEY_BYTES}")
    return _decode_keys(data)


@lru_cache(maxsize=MAX_CACHED)  # all clients of a process read the same keys; an error is not kept
def _decode_keys(data: bytes) -> PublicKeys:
    keys: PublicKeys = decode(data, PublicKeys)
    return keys


def survivors_statement(survivors: Survivors) -> bytes:
    """Return the bytes that a survivor signs in the consistency round."""
    return b"survivors" + encode(survivors)


def digest(session: Session) -> bytes:
    """Return the digest of a session, 32 bytes."""
    hashing = Hash(SHA256())
    hashing.update(encode(session))
    return hashing.finalize()


def generate_secret() -> bytes:
    """Return 16 bytes from the generator of the operating system."""
    return os.urandom(SECRET_BYTES)


def derive_public_key(secret: bytes) -> bytes:
    """Return the X25519 public key of a 16-byte secret."""
    return private_key(secret).public_key().public_bytes_raw()


def derive(secret: bytes, *purpose: bytes | int) -> bytes:
    """Return 32 bytes for one purpose, by HKDF."""
    parts = [part.to_bytes(8, "big", signed=True) if isinstance(part, int) else part for part in purpose]
    info = b"fedlearn secagg %d %b" % (VERSION, b" ".join(parts))
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def private_key(secret: bytes) -> X25519PrivateKey:
    """Return the X25519 private key of a 16-byte secret. A client uses it for all peers of one message."""
    return X25519PrivateKey.from_private_bytes(derive(secret, b"x25519"))


def agree_key(private: X25519PrivateKey, public_key: bytes, *purpose: bytes | int) -> bytes:
    """Return the key that the holders of both secrets share, for one purpose."""
    try:
        return derive(private.exchange(X25519PublicKey.from_public_bytes(public_key)), *purpose)
    except ValueError:
        raise ProtocolError("a public key is not a valid X25519 key, or has low order") from None


def encrypt(key: bytes, plaintext: bytes, context: bytes) -> bytes:
    """Return the encrypted and authenticated plaintext. ``context`` is authenticated, but not encrypted."""
    nonce = os.urandom(12)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, plaintext, context)


def decrypt(key: bytes, ciphertext: bytes, context: bytes, *, sender: int) -> bytes:
    """Return the plaintext; raise `ProtocolError` unless key, ciphertext and context match."""
    try:
        return ChaCha20Poly1305(key).decrypt(ciphertext[:12], ciphertext[12:], context)
    except (InvalidTag, ValueError):
        raise ProtocolError(
            f"the shares from client {sender} are damaged, or not meant for this client and round"
        ) from None


def pairwise_mask_key(private: X25519PrivateKey, public_key: bytes, session: bytes, client: int, peer: int) -> bytes:
    """Return the key of the mask between two clients; both compute the same key."""
    return agree_key(private, public_key, b"mask", session, min(client, peer), max(client, peer))


def self_mask_key(seed: bytes, session: bytes, client: int) -> bytes:
    """Return the key of the self mask of a client."""
    return derive(seed, b"own", session, client)


def add_mask(vector: np.ndarray, key: bytes, *, sign: int) -> None:
    """Add or subtract a mask in place; arithmetic wraps.

    The mask is AES-256's key stream in counter mode from zero, read as little-endian integers. A key serves one mask.
    """
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(BLOCK_BYTES))).encryptor()
    add = np.add if sign > 0 else np.subtract
    key_stream = bytearray(min(CHUNK_BYTES, vector.nbytes) + BLOCK_BYTES)
    per_chunk = CHUNK_BYTES // vector.itemsize
    for start in range(0, len(vector), per_chunk):
        part = vector[start : start + per_chunk]
        stream.update_into(ZEROS[: part.nbytes], key_stream)
        add(part, np.frombuffer(key_stream, vector.dtype, len(part)), out=part)
