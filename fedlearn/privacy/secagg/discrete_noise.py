"""Draw integer noise and round vectors at random under a bound on the norm, from a cryptographic random stream.

Shapes: D numbers in a vector.
"""

from __future__ import annotations

import os
from functools import lru_cache
from math import ceil

import numpy as np

from fedlearn.core.random import Purpose, seed_sequence
from fedlearn.errors import MissingExtra

MAX_STD = 2.0**14  # SciPy's Bessel functions fail from 2**15 on, and 32-bit sums need no larger noise
MAX_ROUNDING_ATTEMPTS = 20


class RandomStream:
    """Stream of random numbers from AES-256 in counter mode.

    In deployment the key comes from the operating system's generator and is used once. So the noise is
    cryptographically strong. NumPy's generators are not, with any seed.

    Args:
        key: 32 bytes.

    Raises:
        MissingExtra: The package cryptography is not installed.
    """

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as missing:
            raise MissingExtra("noise from a cryptographic generator", "privacy") from missing
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def from_system(cls) -> RandomStream:
        """Return a stream from the operating system's generator, which cannot be repeated."""
        return cls(os.urandom(32))

    @classmethod
    def from_seed(cls, seed: int, purpose: Purpose, *, round: int, client: int = 0) -> RandomStream:
        """Return a stream for simulations. Equal arguments give equal numbers."""
        return cls(seed_sequence(seed, purpose, round=round, client=client).generate_state(8, np.uint32).tobytes())

    def uint64(self, size: int) -> np.ndarray:
        """Return ``size`` random 64-bit integers, uint64."""
        return np.frombuffer(self._stream.update(bytes(8 * size)), "<u8")

    def uniform(self, size: int) -> np.ndarray:
        """Return ``size`` uniform float64 numbers in [0, 1), all multiples of 2**-53."""
        return (self.uint64(size) >> np.uint64(11)) * 2.0**-53

    def signs(self, size: int) -> np.ndarray:
        """Return ``size`` random signs, -1.0 or 1.0."""
        return 1.0 - 2.0 * (self.uint64(size) >> np.uint64(63))


def draw_noise(kind: str, std: float, size: int, stream: RandomStream) -> np.ndarray:
    """Draw int64 noise with mean 0, by inversion of the tail probabilities of its magnitude.

    NumPy's samplers are not used, because they cannot draw from a cryptographic generator.

    Args:
        kind: ``skellam`` (the difference of two Poisson variables), or ``discrete_gaussian``.
        std: standard deviation for ``skellam``; parameter sigma for ``discrete_gaussian``, which equals the standard
            deviation up to 1e-7 if it is at least 1. In (0, `MAX_STD`].
        size: number of integers.
        stream: source of random numbers.

    *Guarantees*: the probability of each integer has a relative error below 1e-10. The float64 tables start at the
    tails, so small probabilities are as exact as large ones. Integers with a probability below 2**-63 do not occur.

    References: Agarwal, Kairouz, Liu, *The Skellam Mechanism for Differentially Private Federated Learning*, NeurIPS
    2021, arXiv:2110.04995; Canonne, Kamath, Steinke, *The Discrete Gaussian for Differential Privacy*, NeurIPS 2020,
    arXiv:2004.00010.
    """
    tails = _tails(kind, std)
    bits = stream.uint64(size)
    u = ((bits >> np.uint64(1)) + np.uint64(1)) * 2.0**-63  # in (0, 1], fine near 0
    magnitude = len(tails) - 1 - np.searchsorted(tails, u, side="left")
    return np.where(bits & np.uint64(1), magnitude, -magnitude).astype(np.int64)


@lru_cache(maxsize=8)
def _tails(kind: str, std: float) -> np.ndarray:
    """Return ``P(|noise| >= k)`` for k from the largest value down to 0, so in ascending order."""
    k = np.arange(ceil(12 * std) + 60)
    if kind == "skellam":
        from scipy.special import ive

        p = ive(k, std**2)
    else:
        p = np.exp(-0.5 * (k / std) ** 2)
    tails = 2 * np.cumsum(p[::-1])
    tails /= tails[-1] - p[0]
    assert np.isfinite(tails).all(), f"no table of {kind} noise for a standard deviation of {std}"
    tails[-1] = 1.0
    return tails[np.searchsorted(tails, 2.0**-64) :]


def conditional_round(x_D: np.ndarray, *, norm: float, stream: RandomStream) -> np.ndarray:
    """Round each number up or down at random, without bias, under a bound on the norm.

    A draw that exceeds the bound is repeated. After `MAX_ROUNDING_ATTEMPTS` draws, the numbers are rounded towards
    zero.

    Args:
        x_D: numbers, ``(D,)``.
        norm: L2 bound on the result, at least the L2 norm of ``x_D``.
        stream: source of random numbers.

    Returns:
        Integers, int64, ``(D,)``.

    *Guarantees*: the L2 norm of the result is at most ``norm``.

    Reference: Kairouz, Liu, Steinke, *The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
    Aggregation*, ICML 2021, arXiv:2102.06387, Algorithm 1 (conditional rounding).
    """
    for _ in range(MAX_ROUNDING_ATTEMPTS):
        below_D = np.floor(x_D)
        rounded_D = below_D + (stream.uniform(len(x_D)) < x_D - below_D)
        if rounded_D @ rounded_D <= norm**2:
            return rounded_D.astype(np.int64)
    return np.trunc(x_D).astype(np.int64)
