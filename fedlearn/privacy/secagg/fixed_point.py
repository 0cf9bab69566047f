"""Encode real numbers as integers that are added modulo a power of two, and decode sums.

Shapes: K clients in a block, D numbers in a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2, sqrt

import numpy as np

from fedlearn.errors import is_count, is_number, require

MODULUS_BITS = (16, 32, 64)
LOG_TAIL = 42.3  # ln(2 / p), with the probability p = 2**-60 that noise moves one number of a sum out of range


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedPoint:
    """Encoding of numbers in ``[-bound, bound]`` as integers in ``[-levels, levels]``.

    The number of levels is ``2**(bits - 1) - 1``.

    Args:
        bound: bound on the absolute value of a number, > 0.
        bits: bits of one number of one client, including the sign, in [2, 48].
        modulus_bits: 16, 32 or 64; sums are taken modulo ``2**modulus_bits``.
        max_clients: largest number of terms in a sum, >= 1.
        noise_std: standard deviation of the integer noise on the sum of ``max_clients`` vectors; 0 for no noise.

    *Guarantees*: a sum of up to ``max_clients`` vectors without noise never wraps around. With noise, a number wraps
    around with probability below 2**-60. Other settings raise an error here.

    Raises:
        SettingError: A setting is out of range, or sums could wrap around.

    >>> code = FixedPoint(bound=1.0, bits=20, modulus_bits=32, max_clients=100)
    >>> total = code.wrap(code.encode(np.array([[0.25], [-1.0]]))).sum(axis=0, dtype=np.uint32)
    >>> bool(abs(code.decode(total)[0] + 0.75) < 2 / code.scale)
    True
    """

    bound: float
    bits: int
    modulus_bits: int = 32
    max_clients: int
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        positive = is_number(self.bound, at_least=0) and 0 < self.bound < float("inf")
        require(positive, "clip_norm", self.bound, "a finite number > 0", "clip_norm=1.0")
        fits = is_count(self.bits, at_least=2) and self.bits <= 48
        require(fits, "bits", self.bits, "a whole number in [2, 48]", "bits=20")
        known = self.modulus_bits in MODULUS_BITS
        require(known, "modulus_bits", self.modulus_bits, "16, 32 or 64", "modulus_bits=32")
        counts = is_count(self.max_clients)
        require(counts, "max_clients", self.max_clients, "a whole number >= 1", "max_clients=100")
        largest, limit = self.max_clients * self.max_integer + _tail(self.noise_std), 2 ** (self.modulus_bits - 1)
        fewer = self.bits - 1 - floor(log2(largest / limit))  # one bit less halves the sum
        sums = f"the sum of {self.max_clients} clients, now up to {largest:.3g}"
        expected = f"fewer, because {sums}, must stay below 2**{self.modulus_bits - 1}"
        require(largest < limit, "bits", self.bits, expected, f"bits={fewer}" if fewer > 1 else "modulus_bits=64")

    @property
    def max_integer(self) -> int:
        """Largest integer of one client, ``2**(bits - 1) - 1``."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def scale(self) -> float:
        """Number of integer steps per unit of a real number."""
        return self.max_integer / self.bound

    @property
    def dtype(self) -> np.dtype:
        """Type of wrapped integers: unsigned, little-endian."""
        return np.dtype(f"<u{self.modulus_bits // 8}")

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Clip real numbers to ``bound``, and round them to the nearest signed integers, int64.

        Raises:
            ValueError: A number is NaN or infinite.
        """
        return np.rint(self.scale_values(x)).astype(np.int64)

    def scale_values(self, x: np.ndarray) -> np.ndarray:
        """Return clipped and scaled numbers in ``[-levels, levels]``, float64, before rounding."""
        return np.clip(require_finite(x) * self.scale, -self.max_integer, self.max_integer)

    def wrap(self, integers: np.ndarray) -> np.ndarray:
        """Return signed integers modulo ``2**modulus_bits``, as `dtype`."""
        return integers.astype(np.int64).astype(self.dtype)

    def decode(self, total: np.ndarray) -> np.ndarray:
        """Return the sum of real vectors, float64, from the sum ``total`` of their integers."""
        return total.view(self.dtype.str.replace("u", "i")).astype(np.float64) / self.scale


def require_finite(x: np.ndarray) -> np.ndarray:
    """Return the numbers as float64.

    Raises:
        ValueError: A number is NaN or infinite, so it has no integer.
    """
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("the vector contains NaN or infinity; try a smaller local.learning_rate")
    return x


def _tail(std: float) -> float:
    """Return a bound that noise of variance ``std**2`` exceeds with probability at most 2**-60.

    Bernstein's inequality holds for Skellam noise and for sums of discrete Gaussians, which are sub-Gaussian.
    """
    return (LOG_TAIL / 3 + sqrt((LOG_TAIL / 3) ** 2 + 2 * LOG_TAIL * std**2)) if std else 0.0
