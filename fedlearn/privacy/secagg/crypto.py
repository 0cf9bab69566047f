"""Cryptography of the protocol; the packages `cryptography` and PyCryptodome provide all primitives.

- X25519 for key agreement, HKDF-SHA256 for derived keys, Ed25519 for signatures.
- ChaCha20-Poly1305 for encrypted shares, AES-256 in counter mode for masks.
- Shamir's scheme over GF(2^128) for shares of 16-byte secrets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlearn.privacy.secagg.errors import ProtocolError, reject_if
from fedlearn.privacy.secagg.messages import VERSION, PublicKeys, Session, Survivors, encode

SECRET_BYTES = 16  # size of secrets of Shamir's scheme in PyCryptodome; X25519 has a strength of 128 bits too
CHUNK_BYTES = 1 << 20  # bytes of key stream at a time, which fit the cache


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
    """Raise `ProtocolError` unless the key signed the message."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise ProtocolError(f"the signature of {signer} is not valid") from None


def verify_keys(keys: PublicKeys, registered: Mapping[int, bytes]) -> None:
    """Raise `ProtocolError` unless the registered identity of their client signed the keys."""
    reject_if(keys.client not in registered, f"no identity is registered for client {keys.client}")
    unsigned = encode(replace(keys, signature=b""))
    verify(registered[keys.client], keys.signature, unsigned, signer=f"client {keys.client} under its keys")


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
    return _private(secret).public_key().public_bytes_raw()


def derive(secret: bytes, *purpose: bytes | int) -> bytes:
    """Return 32 bytes for one purpose, by HKDF."""
    parts = [part.to_bytes(8, "big", signed=True) if isinstance(part, int) else part for part in purpose]
    info = b"fedlearn secagg %d %b" % (VERSION, b" ".join(parts))
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)


def agree_key(secret: bytes, public_key: bytes, *purpose: bytes | int) -> bytes:
    """Return the key that the holders of both secrets share, for one purpose."""
    try:
        return derive(_private(secret).exchange(X25519PublicKey.from_public_bytes(public_key)), *purpose)
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


def split(secret: bytes, *, threshold: int, num_shares: int) -> list[bytes]:
    """Return shares of a 16-byte secret, at points 1, 2, ...; any ``threshold`` of them determine it."""
    return [share for _, share in Shamir.split(threshold, num_shares, secret, False)]


def combine(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """Return the secret of at least ``threshold`` shares (point -> share)."""
    assert len(shares) >= threshold
    return bytes(Shamir.combine(list(shares.items())[:threshold], False))


def pairwise_mask_key(secret: bytes, public_key: bytes, session: bytes, client: int, peer: int) -> bytes:
    """Return the key of the mask between two clients; both compute the same key."""
    return agree_key(secret, public_key, b"mask", session, min(client, peer), max(client, peer))


def self_mask_key(seed: bytes, session: bytes, client: int) -> bytes:
    """Return the key of the self mask of a client."""
    return derive(seed, b"own", session, client)


def add_mask(vector: np.ndarray, key: bytes, *, sign: int) -> None:
    """Add or subtract a mask in place; arithmetic wraps.

    The mask is AES-256's key stream in counter mode from zero, read as little-endian integers. A key serves one mask.
    """
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    add = np.add if sign > 0 else np.subtract
    per_chunk = CHUNK_BYTES // vector.itemsize
    for start in range(0, len(vector), per_chunk):
        part = vector[start : start + per_chunk]
        add(part, np.frombuffer(stream.update(bytes(part.nbytes)), vector.dtype), out=part)


def _private(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(derive(secret, b"x25519"))
