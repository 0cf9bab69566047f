"""Between real numbers and integers that are added modulo a power of two.

Shapes: K clients in a block, D numbers in a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2, sqrt

import numpy as np

from fedlearn.errors import is_count, is_number, require

MODULUS_BITS = (16, 32, 64)
LOG_TAIL = 42.3  # ln(2 / p) for p = 2**-60: how often noise may carry one number of one sum out of range


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedPoint:
    """Numbers in ``[-bound, bound]`` as integers in ``[-levels, levels]``, with ``levels = 2**(bits - 1) - 1``.

    Args:
        bound: of a number, > 0.
        bits: of one client's number, sign included, in [2, 48].
        modulus_bits: sums are taken modulo ``2**modulus_bits``; 16, 32 or 64.
        max_clients: terms in a sum at most.
        noise_std: standard deviation of integer noise on the sum of ``max_clients``; 0 for none.

    *Guarantees*: no sum of up to ``max_clients`` vectors wraps around - never without noise, and with probability below
    2**-60 for each number with it; settings for which this would not hold are refused here, before anything is added.

    Raises:
        SettingError: a setting is out of range, or sums could wrap around.

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
        fewer = self.bits - 1 - floor(log2(largest / limit))  # all of it halves with each bit
        sums = f"a sum of {self.max_clients} clients, which reaches {largest:.3g}"
        needed = f"fewer: {sums}, must stay below 2**{self.modulus_bits - 1}"
        require(largest < limit, "bits", self.bits, needed, f"bits={fewer}" if fewer > 1 else "modulus_bits=64")

    @property
    def max_integer(self) -> int:
        """The largest integer of one client."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def scale(self) -> float:
        """Integers to one unit."""
        return self.max_integer / self.bound

    @property
    def dtype(self) -> np.dtype:
        """Of wrapped integers: unsigned, little-endian."""
        return np.dtype(f"<u{self.modulus_bits // 8}")

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Signed integers; clipped to ``bound``, rounded to the nearest.

        Raises:
            ValueError: a number is NaN or infinite: it has no integer.
        """
        return np.rint(self.scale_values(x)).astype(np.int64)

    def scale_values(self, x: np.ndarray) -> np.ndarray:
        """Still real, in ``[-levels, levels]``; to be rounded."""
        return np.clip(require_finite(x) * self.scale, -self.max_integer, self.max_integer)

    def wrap(self, integers: np.ndarray) -> np.ndarray:
        """Signed integers modulo ``2**modulus_bits``."""
        return integers.astype(np.int64).astype(self.dtype)

    def decode(self, total: np.ndarray) -> np.ndarray:
        """The sum, as float64, of real vectors whose integers add up to ``total``."""
        return total.view(self.dtype.str.replace("u", "i")).astype(np.float64) / self.scale


def require_finite(x: np.ndarray) -> np.ndarray:
    """As float64; `ValueError` for NaN and infinity, which have no integer."""
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("a vector to be encoded holds NaN or infinity")
    return x


def _tail(std: float) -> float:
    """What noise of variance ``std**2`` exceeds with probability 2**-60 at most (Bernstein's inequality).

    Holds for sums of discrete Gaussians, which are sub-Gaussian, and for Skellam noise.
    """
    return (LOG_TAIL / 3 + sqrt((LOG_TAIL / 3) ** 2 + 2 * LOG_TAIL * std**2)) if std else 0.0
