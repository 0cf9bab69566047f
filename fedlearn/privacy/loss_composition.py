"""Compose the loss distributions of a history, and compute epsilon from the result.

References: Koskela, Jälkö, Honkela, *Computing Tight Differential Privacy Guarantees Using FFT*, AISTATS 2020,
arXiv:1906.03049; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, *Connect the Dots*, PETS 2022, arXiv:2207.04380.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, exp, expm1, floor, inf, log, log1p, log2, sqrt

import numpy as np

from fedlearn.privacy.loss_distributions import (
    MAX_LOSS,
    LossDistribution,
    LossEvent,
    largest_loss,
    loss_deviation,
    loss_distributions,
)

COARSE = 2.0  # points of a coarse grid in one standard deviation of the loss of a release
MAX_GRID_SIZE = 2**18  # points of a composed distribution; above this the grid is coarser
TAIL = 1e-6  # probability outside of the window of a composed distribution, divided by delta
ROUNDING = 2e-16  # rounding error of a transform of masses with the sum 1, for each release; 50 more for the transform
PRECISION = 1e4  # a delta below this multiple of the rounding error needs tilted masses

Parts = Sequence[tuple[LossDistribution, int]]  # distributions on one grid, each with its number of releases
_fine_distributions = lru_cache(maxsize=16)(loss_distributions)  # up to 10 MB each
_coarse_distributions = lru_cache(maxsize=1024)(loss_distributions)


def composed_epsilon(history: Sequence[tuple[LossEvent, int]], delta: float, *, coarse: bool = False) -> float:
    """Return an upper bound on the epsilon of all releases of a history.

    Args:
        history: events and their counts.
        delta: in (0, 1); deltas of the events are not subtracted.
        coarse: use a coarse grid, which raises epsilon by a few percent and takes less than a millisecond.
    """
    step, distributions = _grid_step(history, coarse), _coarse_distributions if coarse else _fine_distributions
    while True:
        pairs = [(distributions(event, step), count) for event, count in history]
        compositions = [_Composition(parts, delta) for parts in _directions(pairs)]
        size = max(composition.high - composition.low for composition in compositions)
        if size < MAX_GRID_SIZE:
            return max(composition.epsilon() for composition in compositions)
        step *= 2.0 ** ceil(log2((size + 1) / MAX_GRID_SIZE))


def _directions(pairs: Sequence[tuple[tuple[LossDistribution, ...], int]]) -> list[Parts]:
    """Return the distributions for a record that is removed, and for a record that is added."""
    if all(len(both) == 1 for both, _ in pairs):
        return [[(both[0], count) for both, count in pairs]]
    return [[(both[0], count) for both, count in pairs], [(both[-1], count) for both, count in pairs]]


def _grid_step(history: Sequence[tuple[LossEvent, int]], coarse: bool) -> float:
    """Return the distance of the points of the grid, a power of two so that histories share distributions.

    Rounding to a grid with r points in a standard deviation raises epsilon by about 1 / (24 r^2), for any number of
    releases. The fine grid has 32 to 256 points, fewer for many releases, whose sum has a wide distribution.
    """
    total = sum(count for _, count in history)
    variance = sum(count * loss_deviation(event) ** 2 for event, count in history) / total
    resolution = COARSE if coarse else min(max(2048 / sqrt(total), 32.0), 256.0)
    largest = max(largest_loss(event) for event, _ in history)
    step = max(sqrt(variance) / resolution, 2 * largest / MAX_GRID_SIZE)
    return float(2.0 ** floor(log2(step)))


class _Composition:
    """Composition of releases by a cyclic Fourier transform of tilted distributions.

    The rounding errors of a transform are relative to the largest mass. The distribution ``mass * exp(tilt * loss)``
    has more of its mass near epsilon. So a tilt makes a small delta accurate; a large delta needs none. A cyclic
    transform moves losses below the window to its top, and losses above the window to its bottom. Both only add mass.
    The losses above the window also count as infinite.

    Args:
        parts: the distributions, with their numbers of releases.
        delta: delta of the guarantee.
    """

    def __init__(self, parts: Parts, delta: float) -> None:
        self.parts, self.delta, self.step = parts, delta, parts[0][0].step
        self.infinite = -expm1(sum(count * log1p(-part.infinite) for part, count in parts))
        self.lowest = self.low = self.high = sum(count * part.lowest for part, count in parts)
        self.tilt = 0.0
        if self.infinite >= delta:
            return
        self.rounding = ROUNDING * (50 + sum(count for _, count in parts))
        scale = min(1.0, delta / (PRECISION * self.rounding))
        if scale < 1:
            self.tilt = self._tail_bound(1, scale)[1]
        tail, highest = TAIL * delta / scale, sum(count * part.highest for part, count in parts)
        self.low = max(self.lowest, floor(self._tail_bound(-1, tail)[0] / self.step))
        self.high = min(highest, ceil(self._tail_bound(1, tail)[0] / self.step))
        if self.high < highest:
            self.infinite += tail * exp(self._log_moment(self.tilt) - self.tilt * self.high * self.step)

    def _log_moment(self, order: float) -> float:
        return sum(count * part.log_moment(order) for part, count in self.parts)

    def _tail_bound(self, sign: int, tail: float) -> tuple[float, float]:
        """Return a loss beyond which the tilted mass is at most ``tail``, and the order of a moment that shows this.

        Args:
            sign: 1 for the mass above the loss, -1 for the mass below it.
            tail: the mass.
        """

        def bound(power: int) -> float:  # Chernoff's bound, on the loss times the sign
            growth = self._log_moment(self.tilt + sign * 2.0**power) - self._log_moment(self.tilt)
            return (growth - log(tail)) / 2.0**power

        count = sum(count for _, count in self.parts)
        power = round(log2(sqrt(-2 * log(tail) / count) / (32 * self.step)))  # a rough start
        for direction in (1, -1):
            while bound(power + direction) < bound(power):
                power += direction
        return sign * bound(power), self.tilt + sign * 2.0**power

    def epsilon(self) -> float:
        """Return the smallest epsilon >= 0 with a delta of at most ``delta``."""
        if self.infinite >= self.delta:
            return inf
        first, last = max(0, self.low), min(self.high, floor(MAX_LOSS / self.step))
        if last < first:
            return 0.0 if self.high < 0 else inf
        losses = self.step * np.arange(first, last + 1)
        scale = np.exp(np.minimum(self._log_moment(self.tilt) - self.tilt * losses, MAX_LOSS))
        mass = self._masses()[first - self.low :][: len(losses)] * scale
        under_p = self.infinite + np.cumsum(mass[::-1])[::-1]  # mass from each loss on
        under_q = np.cumsum((mass * np.exp(-losses))[::-1])[::-1]
        profile = np.append(under_p[1:], self.infinite) - np.exp(losses) * np.append(under_q[1:], 0.0)
        above = np.flatnonzero(profile + self.rounding * scale > self.delta)  # losses with a larger delta
        place = above[-1] + 1 if len(above) else 0
        if place == len(losses):
            return inf
        if place == 0 and first == 0:
            return 0.0
        return max(0.0, log((under_p[place] - self.delta) / under_q[place]))

    def _masses(self) -> np.ndarray:
        """Return the tilted masses from the loss ``low`` on."""
        size = 2 ** max(1, ceil(log2(self.high - self.low + 1)))
        spectrum = np.exp(sum(count * part.log_spectrum(size, self.tilt) for part, count in self.parts))
        return np.roll(np.fft.irfft(spectrum, size), self.lowest - self.low)
