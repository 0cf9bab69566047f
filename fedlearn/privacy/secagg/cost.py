"""Compute the privacy cost of the integer noise of many clients: Renyi differential privacy of one opened sum.

The adjacency is zero-out: one client's vector is replaced by zero. Client sampling gives no amplification, because the
guarantee holds against the server, and the server knows the cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, pi, sqrt

import numpy as np

MAX_DIMENSION = 2.0**40  # numbers of a vector; used for bounds that grow with the dimension


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisySum:
    """One opened sum of integer vectors; each vector contains the noise of its client.

    Attributes:
        kind: distribution of the noise, ``skellam`` or ``discrete_gaussian``.
        std: standard deviation of one client's noise on each number, in integers.
        norm: L2 bound on one client's vector of integers, before the noise.
        min_clients: smallest number of clients in a sum; only their noise is guaranteed.
        max_clients: largest number of clients in a sum.
    """

    kind: str
    std: float
    norm: float
    min_clients: int
    max_clients: int

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise in the smallest sum divided by the norm bound."""
        return self.std * sqrt(self.min_clients) / self.norm

    @property
    def equivalent_noise_multiplier(self) -> float:
        """Noise multiplier of a Gaussian release that costs at least as much at each whole order.

        A ledger of Gaussian releases may book this Gaussian, if it uses Renyi divergences at whole orders only. The
        ratio of divergence and order does not increase, so order 2 determines the result.
        """
        return 1 / sqrt(float(self.rdp([2])[0]))

    def rdp(self, orders: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the Renyi divergences of one release. They add up over releases.

        Args:
            orders: orders, each > 1.
        """
        if self.kind == "skellam":
            variance = self.min_clients * self.std**2
            return np.array([skellam_rdp(order, variance=variance, l2=self.norm, l1=self.norm**2) for order in orders])
        size = {"num_clients": self.min_clients, "max_clients": self.max_clients}
        epsilon = discrete_gaussian_cdp(std=self.std, l2=self.norm, dimension=MAX_DIMENSION, **size)
        return 0.5 * epsilon**2 * np.asarray(orders, np.float64)


def skellam_rdp(order: float, *, variance: float, l2: float, l1: float) -> float:
    """Return the Renyi divergence of the Skellam mechanism.

    ``alpha l2^2 / (2 v) + min(((2 alpha - 1) l2^2 + 6 l1) / (4 v^2), 3 l1 / (2 v))`` at whole alpha. The theorem covers
    whole orders only. For other orders the result is the value at the next whole order, which is larger.

    Args:
        order: alpha, > 1.
        variance: v, the variance of the noise on each number.
        l2: bound on the L2 norm of an integer vector.
        l1: bound on the L1 norm of an integer vector; ``l2**2`` is always valid for integers.

    Reference: Agarwal, Kairouz, Liu, NeurIPS 2021, arXiv:2110.04995, Section 3.
    """
    alpha = ceil(order)
    extra = min(((2 * alpha - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return alpha * l2**2 / (2 * variance) + extra


def discrete_gaussian_cdp(
    *, num_clients: int, std: float, l2: float, dimension: float, max_clients: int | None = None
) -> float:
    """Return an epsilon such that the sum of ``num_clients`` discrete Gaussians is ``epsilon**2 / 2``-zCDP.

    ``min(sqrt(l2^2 / (n s^2) + tau d / 2), l2 / (sqrt(n) s) + tau sqrt(d))`` with
    ``tau = 10 sum_{k<n} exp(-2 pi^2 s^2 k / (k + 1))``. The term tau is necessary because a sum of discrete Gaussians
    is not exactly a discrete Gaussian. For ``std`` below about 1 the difference is large.

    Args:
        num_clients: n, the smallest number of clients in a sum, >= 1.
        std: s, the standard deviation of one client's noise on each number, > 0.
        l2: bound on the L2 norm of one client's vector.
        dimension: d, the number of numbers in a vector.
        max_clients: largest number of clients, for tau, which grows with it; None for ``num_clients``.

    Reference: Kairouz, Liu, Steinke, ICML 2021, arXiv:2102.06387, Theorem 1.
    """
    tau = 10 * sum(exp(-2 * pi**2 * std**2 * k / (k + 1)) for k in range(1, max_clients or num_clients))
    central = l2 / (sqrt(num_clients) * std)
    return min(sqrt(central**2 + tau * dimension / 2), central + tau * sqrt(dimension))
