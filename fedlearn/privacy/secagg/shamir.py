"""Shamir's secret sharing over GF(2^128), for many shares at a time.

Shapes: S secrets, N shares, B bits of a point.

The field has the polynomial ``x^128 + x^7 + x^2 + x + 1``, as in PyCryptodome, so both can read each other's shares.
A point has few bits, so a product with it is a sum of a few shifts, which NumPy computes for all shares at once. Its
time does not depend on the secrets.

Reference: Shamir, *How to Share a Secret*, Communications of the ACM 1979.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, reduce

import numpy as np

SECRET_BYTES = 16
REDUCTION = 0b10000111  # x^128 equals x^7 + x^2 + x + 1
POLYNOMIAL = (1 << 128) | REDUCTION


def split(secrets: Sequence[bytes], *, threshold: int, num_shares: int) -> list[list[bytes]]:
    """Return the shares of each secret, at the points 1, 2, ..., ``num_shares``.

    Args:
        secrets: secrets of 16 bytes.
        threshold: number of shares that determine a secret; fewer shares reveal nothing. At least 1.
        num_shares: number of shares of each secret, at least ``threshold``.
    """
    random = os.urandom(SECRET_BYTES * (threshold - 1) * len(secrets))
    coefficients = [*np.frombuffer(random, ">u8").reshape(threshold - 1, len(secrets), 2)]
    coefficients.append(np.frombuffer(b"".join(secrets), ">u8").reshape(len(secrets), 2))
    points_N = np.arange(1, num_shares + 1, dtype=np.uint64)
    masks_BN = [-((points_N >> np.uint64(bit)) & np.uint64(1)) for bit in range(num_shares.bit_length())]
    high_SN, low_SN = np.zeros((2, len(secrets), num_shares), np.uint64)
    for coefficient_S2 in coefficients:  # Horner's scheme
        high_SN, low_SN = _multiply_by_points(high_SN, low_SN, masks_BN)
        high_SN ^= coefficient_S2[:, :1].astype(np.uint64)
        low_SN ^= coefficient_S2[:, 1:].astype(np.uint64)
    encoded = np.stack([high_SN, low_SN], axis=2).astype(">u8")
    return [[share.tobytes() for share in row] for row in encoded]


def combine(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """Return the secret of at least ``threshold`` shares (point -> share)."""
    assert len(shares) >= threshold
    chosen = list(shares.items())[:threshold]
    weights = _weights_at_zero(tuple(point for point, _ in chosen))
    values = (int.from_bytes(share, "big") for _, share in chosen)
    terms = [multiply(weight, value) for weight, value in zip(weights, values, strict=True)]
    return reduce(int.__xor__, terms).to_bytes(SECRET_BYTES, "big")


def multiply(a: int, b: int) -> int:
    """Return the product of two elements of the field.

    >>> hex(multiply(1 << 127, 2))
    '0x87'
    """
    product = 0
    while b:
        lowest = b & -b
        product ^= a * lowest
        b ^= lowest
    while high := product >> 128:
        product = (product & ((1 << 128) - 1)) ^ high ^ (high << 1) ^ (high << 2) ^ (high << 7)
    return product


def invert(a: int) -> int:
    """Return the inverse of an element other than zero, by Euclid's algorithm for polynomials.

    >>> multiply(invert(12345), 12345)
    1
    """
    old, new, old_factor, new_factor = POLYNOMIAL, a, 0, 1
    while new:
        while (shift := old.bit_length() - new.bit_length()) >= 0 and old:
            old ^= new << shift
            old_factor ^= new_factor << shift
        old, new, old_factor, new_factor = new, old, new_factor, old_factor
    return multiply(old_factor, 1)


def _multiply_by_points(
    high_SN: np.ndarray, low_SN: np.ndarray, masks_BN: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Multiply elements by the points 1, 2, ..., N. A mask has all bits of a point's position that has this bit."""
    new_high_SN, new_low_SN = high_SN & masks_BN[0], low_SN & masks_BN[0]
    over_SN = np.zeros_like(high_SN)  # bits above the 128th
    for bit, mask_N in enumerate(masks_BN[1:], 1):
        left, right = np.uint64(bit), np.uint64(64 - bit)
        new_low_SN ^= (low_SN << left) & mask_N
        new_high_SN ^= ((high_SN << left) | (low_SN >> right)) & mask_N
        over_SN ^= (high_SN >> right) & mask_N
    for shift in (0, 1, 2, 7):
        new_low_SN ^= over_SN << np.uint64(shift)
    return new_high_SN, new_low_SN


@lru_cache(maxsize=16)  # the holders of a round are the same for all secrets
def _weights_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return the weights of Lagrange's interpolation at zero."""
    weights = []
    for point in points:
        others = [other for other in points if other != point]
        numerator = reduce(multiply, others, 1)
        denominator = reduce(lambda product, other: multiply(product, point ^ other), others, 1)
        weights.append(multiply(numerator, invert(denominator)))
    return tuple(weights)
