"""What integer noise that many clients add together costs: Renyi differential privacy of one opened sum.

Adjacency is zero-out: one client's vector is there, or is zero. Nothing is gained by sampling clients: the server, from
whom this protects, knows who took part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, pi, sqrt

import numpy as np

MAX_DIMENSION = 2.0**40  # numbers; what a bound that grows with the dimension is computed for


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisySum:
    """One opened sum of integer vectors, each with its client's own noise.

    Attributes:
        kind: ``skellam`` or ``discrete_gaussian``.
        std: of one client's noise on each number.
        norm: L2 bound on one client's vector of integers.
        min_clients: the fewest clients in a sum: only so much noise is sure to be there.
        max_clients: the most.
    """

    kind: str
    std: float
    norm: float
    min_clients: int
    max_clients: int

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise in the smallest sum, over the norm bound."""
        return self.std * sqrt(self.min_clients) / self.norm

    @property
    def equivalent_noise_multiplier(self) -> float:
        """Noise multiplier of a Gaussian release that costs at least as much at every whole order.

        A ledger of Gaussian releases may book that one, if it looks at Renyi divergences of whole orders only: relative
        to the order, divergences of this release do not grow, so that the order 2 decides.
        """
        return 1 / sqrt(float(self.rdp([2])[0]))

    def rdp(self, orders: Sequence[float] | np.ndarray) -> np.ndarray:
        """Renyi divergence of one release, at orders > 1; adds up over releases."""
        if self.kind == "skellam":
            variance = self.min_clients * self.std**2
            return np.array([skellam_rdp(order, variance=variance, l2=self.norm, l1=self.norm**2) for order in orders])
        size = {"num_clients": self.min_clients, "max_clients": self.max_clients}
        epsilon = discrete_gaussian_cdp(std=self.std, l2=self.norm, dimension=MAX_DIMENSION, **size)
        return 0.5 * epsilon**2 * np.asarray(orders, np.float64)


def skellam_rdp(order: float, *, variance: float, l2: float, l1: float) -> float:
    """Renyi divergence of the Skellam mechanism.

    ``alpha l2^2 / (2 v) + min(((2 alpha - 1) l2^2 + 6 l1) / (4 v^2), 3 l1 / (2 v))`` at whole alpha; in between, where
    the theorem is silent, the value at the next whole one, which is larger.

    Args:
        order: alpha, > 1.
        variance: v, of the noise on each number.
        l2: bound on an integer vector.
        l1: another; ``l2**2`` is always one, since these are integers.

    Reference: Agarwal, Kairouz, Liu, NeurIPS 2021, arXiv:2110.04995, Section 3.
    """
    alpha = ceil(order)
    extra = min(((2 * alpha - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return alpha * l2**2 / (2 * variance) + extra


def discrete_gaussian_cdp(
    *, num_clients: int, std: float, l2: float, dimension: float, max_clients: int | None = None
) -> float:
    """An epsilon such that the sum of ``num_clients`` discrete Gaussians is ``epsilon**2 / 2``-zCDP.

    ``min(sqrt(l2^2 / (n s^2) + tau d / 2), l2 / (sqrt(n) s) + tau sqrt(d))`` with
    ``tau = 10 sum_{k<n} exp(-2 pi^2 s^2 k / (k + 1))``: sums of discrete Gaussians are not quite discrete Gaussian, and
    for ``std`` below about 1 nowhere near.

    Args:
        num_clients: n, at least so many.
        std: s, of one client's noise on each number.
        l2: bound on one client's vector.
        dimension: d.
        max_clients: clients at most, for tau, which grows with them; None takes ``num_clients``.

    Reference: Kairouz, Liu, Steinke, ICML 2021, arXiv:2102.06387, Theorem 1.
    """
    tau = 10 * sum(exp(-2 * pi**2 * std**2 * k / (k + 1)) for k in range(1, max_clients or num_clients))
    central = l2 / (sqrt(num_clients) * std)
    return min(sqrt(central**2 + tau * dimension / 2), central + tau * sqrt(dimension))
