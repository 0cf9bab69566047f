"""Integer noise, rounding that keeps a norm, and the random bytes that both are made of.

Shapes: D numbers in a vector.
"""

from __future__ import annotations

import os
from functools import lru_cache
from math import ceil

import numpy as np

from fedlearn.core.random import Purpose, seed_sequence
from fedlearn.errors import MissingExtra

MAX_STD = 2.0**14  # SciPy's Bessel functions fail from 2**15 on, and nothing that fits 32 bits needs more
MAX_ROUNDING_ATTEMPTS = 20


class RandomStream:
    """Random numbers from AES-256 in counter mode.

    Args:
        key: 32 bytes.

    In deployment the key comes from the operating system's generator and is never used again, so that noise is
    cryptographically strong; NumPy's generators, whichever seed they get, are not.
    """

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as missing:
            raise MissingExtra("noise from a cryptographic generator", "privacy") from missing
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def from_system(cls) -> RandomStream:
        """From the operating system's generator: not to be had again."""
        return cls(os.urandom(32))

    @classmethod
    def from_seed(cls, seed: int, purpose: Purpose, *, round: int, client: int = 0) -> RandomStream:
        """For simulations: equal arguments give equal numbers."""
        return cls(seed_sequence(seed, purpose, round=round, client=client).generate_state(8, np.uint32).tobytes())

    def uint64(self, size: int) -> np.ndarray:
        """``size`` random 64-bit words."""
        return np.frombuffer(self._stream.update(bytes(8 * size)), "<u8")

    def uniform(self, size: int) -> np.ndarray:
        """Float64 in [0, 1), all multiples of 2**-53."""
        return (self.uint64(size) >> np.uint64(11)) * 2.0**-53

    def signs(self, size: int) -> np.ndarray:
        """-1.0 or 1.0."""
        return 1.0 - 2.0 * (self.uint64(size) >> np.uint64(63))


def draw_noise(kind: str, std: float, size: int, stream: RandomStream) -> np.ndarray:
    """Int64 noise with mean 0, by inversion of the tail probabilities of its size.

    Args:
        kind: ``skellam`` (the difference of two Poisson variables), or ``discrete_gaussian``.
        std: for ``skellam`` the standard deviation; for ``discrete_gaussian`` its parameter sigma, which from 1 on is
            the standard deviation up to 1e-7. At most `MAX_STD`.
        size: how many.
        stream: of random numbers.

    *Guarantees*: each integer's probability is right up to a relative error below 1e-10 (SciPy's Bessel functions, and
    float64 tables that are inverted from the tails, so that small probabilities are as good as large ones); what is
    less likely than 2**-63 does not occur. NumPy's samplers cannot draw from a cryptographic generator.

    References: Agarwal, Kairouz, Liu, *The Skellam Mechanism for Differentially Private Federated Learning*, NeurIPS
    2021, arXiv:2110.04995; Canonne, Kamath, Steinke, *The Discrete Gaussian for Differential Privacy*, NeurIPS 2020,
    arXiv:2004.00010.
    """
    tails = _tails(kind, std)
    words = stream.uint64(size)
    u = ((words >> np.uint64(1)) + np.uint64(1)) * 2.0**-63  # in (0, 1], fine near 0
    magnitude = len(tails) - 1 - np.searchsorted(tails, u, side="left")
    return np.where(words & np.uint64(1), magnitude, -magnitude).astype(np.int64)


@lru_cache(maxsize=8)
def _tails(kind: str, std: float) -> np.ndarray:
    """``P(|noise| >= k)`` for k from large to 0, ascending."""
    k = np.arange(ceil(12 * std) + 60)
    if kind == "skellam":
        from scipy.special import ive

        p = ive(k, std**2)
    else:
        p = np.exp(-0.5 * (k / std) ** 2)
    tails = 2 * np.cumsum(p[::-1])
    tails /= tails[-1] - p[0]
    assert np.isfinite(tails).all(), f"no table of {kind} noise for a deviation of {std}"
    tails[-1] = 1.0
    return tails[np.searchsorted(tails, 2.0**-64) :]


def conditional_round(x_D: np.ndarray, *, norm: float, stream: RandomStream) -> np.ndarray:
    """Int64: each number rounded up or down at random, so that it is right on average, under a bound on the norm.

    Draws that exceed the bound are repeated, and after a few are replaced by rounding towards zero.

    *Guarantees*: the result's L2 norm is at most ``norm``, if that of ``x_D`` is.

    Reference: Kairouz, Liu, Steinke, *The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
    Aggregation*, ICML 2021, arXiv:2102.06387, Algorithm 1 (conditional rounding).
    """
    for _ in range(MAX_ROUNDING_ATTEMPTS):
        below_D = np.floor(x_D)
        rounded_D = below_D + (stream.uniform(len(x_D)) < x_D - below_D)
        if rounded_D @ rounded_D <= norm**2:
            return rounded_D.astype(np.int64)
    return np.trunc(x_D).astype(np.int64)
