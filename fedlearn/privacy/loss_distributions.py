"""Privacy loss distributions on a grid, and their composition.

The privacy loss of an output is the log of the ratio of its two probabilities: P with the record, Q without it. The
distribution of the loss under P determines delta for each epsilon, also after composition, because losses add up.

Each distribution here belongs to a pair (P, Q) that **dominates** the mechanism: for each epsilon, also a negative one,
its delta is at least the delta of any two neighboring data sets. Dominating pairs compose, also for adaptive mechanisms
(Zhu, Dong, Wang). Losses are moved to a grid in such a way that the result dominates the pair (Doroshenko et al.). So a
coarse grid gives a cheap upper bound, and a fine grid gives a tight one.

**Poisson sampling** with rate q; a record is added or removed. The pairs are ``((1 - q) Q + q P, Q)`` and its mirror
image. Each composes by itself, and the larger delta counts.

**Sampling without replacement** with rate q; a record is replaced. The decision note
``docs/decisions/011-privacy-accounting.md`` has the proof. The pair is its mirror image: the positive losses are those
of ``((1 - q) Q + q P, Q)``, and the rest of the probability has loss 0.

References: Zhu, Dong, Wang, *Optimal Accounting of Differential Privacy via Characteristic Function*, AISTATS 2022,
arXiv:2106.08567; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, *Connect the Dots*, PETS 2022, arXiv:2207.04380;
Koskela, Jälkö, Honkela, *Computing Tight Differential Privacy Guarantees Using FFT*, AISTATS 2020, arXiv:1906.03049.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, exp, expm1, floor, inf, log, log1p, log2, sqrt

import numpy as np

from fedlearn.core.privacy_ledger import EpsilonDeltaEvent, Event, LaplaceEvent

LossEvent = Event | LaplaceEvent | EpsilonDeltaEvent
COARSE = 2.0  # points of a coarse grid in one standard deviation of the loss of a release
MAX_GRID_SIZE = 2**18  # points of a composed distribution; above this the grid is coarser
MAX_LOSS = 600.0  # larger losses count as infinite, because their exponentials overflow
TAIL_SCORE = 9.0  # normal score at which the noise of a release is cut off; the probability of this tail is 1e-19
TAIL = 1e-6  # probability outside of the window of a composed distribution, divided by delta
ROUNDING = 2e-16  # rounding error of a transform of masses with the sum 1, for each release; 50 more for the transform
PRECISION = 1e4  # a delta below this multiple of the rounding error needs tilted masses


@dataclass(frozen=True, eq=False)
class LossDistribution:
    """Distribution of a privacy loss on the grid ``step * (lowest + i)``.

    Attributes:
        step: distance of two points of the grid.
        lowest: index of the smallest loss.
        mass: probability of each point.
        infinite: probability of an infinite loss.
    """

    step: float
    lowest: int
    mass: np.ndarray
    infinite: float
    _moments: dict[float, float] = field(default_factory=dict)
    _spectra: dict[tuple[int, float], np.ndarray] = field(default_factory=dict)

    @property
    def highest(self) -> int:
        """Index of the largest finite loss."""
        return self.lowest + len(self.mass) - 1

    def log_moment(self, order: float) -> float:
        """Return the log of the mean of ``exp(order * loss)`` over finite losses."""
        if order not in self._moments:
            with np.errstate(divide="ignore"):
                exponents = order * self.step * np.arange(self.lowest, self.highest + 1) + np.log(self.mass)
            top = exponents.max()
            self._moments[order] = float(top + np.log(np.exp(exponents - top).sum()))
        return self._moments[order]

    def log_spectrum(self, size: int, tilt: float) -> np.ndarray:
        """Return the log of the Fourier transform of ``mass * exp(tilt * loss)``, scaled to a sum of 1.

        Args:
            size: number of points of the cyclic transform.
            tilt: order of the exponential weights.
        """
        if (size, tilt) not in self._spectra:
            with np.errstate(divide="ignore"):
                exponents = tilt * self.step * np.arange(self.lowest, self.highest + 1) + np.log(self.mass)
            tilted = np.exp(exponents - self.log_moment(tilt))
            padded = np.bincount(np.arange(len(tilted)) % size, tilted, minlength=size)
            self._spectra[size, tilt] = np.log(np.fft.rfft(padded) + 1e-300)
        return self._spectra[size, tilt]


Parts = Sequence[tuple[LossDistribution, int]]  # distributions on one grid, each with its number of releases


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
    largest = max(float(_sampled_loss(np.array(_largest_loss(event)), event)) for event, _ in history)
    step = max(sqrt(variance) / resolution, 2 * min(largest, MAX_LOSS) / MAX_GRID_SIZE)
    return float(2.0 ** floor(log2(step)))


@lru_cache(maxsize=1024)
def loss_deviation(event: LossEvent) -> float:
    """Return the approximate standard deviation of the loss of one release."""
    largest = _largest_loss(event)
    unsampled = np.linspace(-1.01 * largest, 1.01 * largest, 1025)
    losses = _sampled_loss(unsampled, event)
    mass = np.diff(_cumulative(losses, event)[0], prepend=0.0)
    mean = (losses * mass).sum()
    return float(max(sqrt(((losses - mean) ** 2 * mass).sum()), 1e-14))


def loss_distributions(event: LossEvent, step: float) -> tuple[LossDistribution, ...]:
    """Return the loss distributions of one release: one if it is its mirror image, else for removal and addition.

    Args:
        event: the release.
        step: distance of the points of the grid.
    """
    rate, largest = _rate(event), _largest_loss(event)
    high = ceil(min(float(_sampled_loss(np.array(largest), event)), MAX_LOSS) / step)
    if _is_fixed_size(event):
        return (_mirrored(event, high, step),)
    low = floor(max(float(_sampled_loss(np.array(-largest), event)), -MAX_LOSS) / step)
    edges = step * np.arange(low, high + 1)
    first, second = _interval_masses(edges, event)
    removed = _connect_dots(low, step, first, second)
    if rate == 1:
        return (removed,)
    return removed, _connect_dots(-high, step, second[::-1], first[::-1])


_fine_distributions = lru_cache(maxsize=16)(loss_distributions)  # up to 10 MB each
_coarse_distributions = lru_cache(maxsize=1024)(loss_distributions)


def _mirrored(event: LossEvent, high: int, step: float) -> LossDistribution:
    """Return the distribution for sampling without replacement; see the decision note."""
    first, second = _interval_masses(step * np.arange(high + 1), event)
    first[0], second[0] = 0.0, 0.0  # losses below 0
    positive = _connect_dots(0, step, first, second)
    negative = _connect_dots(-high, step, second[::-1], first[::-1])
    mass = np.concatenate([negative.mass[:-1], [0.0], positive.mass[1:]])
    mass[high] = negative.mass[-1] + positive.mass[0] + max(0.0, 1 - first.sum() - second.sum())
    return LossDistribution(step, -high, mass, positive.infinite)


def _connect_dots(lowest: int, step: float, first: np.ndarray, second: np.ndarray) -> LossDistribution:
    """Return a distribution on a grid of n + 1 points that dominates a pair of distributions.

    The mass of an interval goes to both of its ends such that both masses are kept. Losses below the grid go to its
    lowest point. Losses above the grid become infinite.

    Args:
        lowest: index of the first point.
        step: distance of the points.
        first: mass under P below the grid, in each of the n intervals, and above the grid.
        second: these masses under Q.
    """
    ends = step * (lowest + np.arange(len(first) - 2))
    upper = (first[1:-1] - second[1:-1] * np.exp(ends)) / -expm1(-step)
    upper = np.clip(upper, 0.0, first[1:-1])
    mass = np.concatenate([[first[0]], upper])
    mass[:-1] += first[1:-1] - upper
    return LossDistribution(step, lowest, mass, float(first[-1]))


def _interval_masses(edges: np.ndarray, event: LossEvent) -> tuple[np.ndarray, np.ndarray]:
    """Return the masses under P and Q below the edges, between them, and above them."""
    below, above = _cumulative(edges, event), _exceeding(edges, event)
    return tuple(_differences(*tails) for tails in zip(below, above, strict=True))  # type: ignore[return-value]


def _differences(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Return the masses between edges. The smaller tail is used, because its differences are accurate."""
    inner = np.where(below[1:] < 0.5, np.diff(below), -np.diff(above))
    return np.concatenate([below[:1], np.maximum(inner, 0.0), above[-1:]])


def _cumulative(losses: np.ndarray, event: LossEvent) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities of at most these losses, under P and under Q."""
    unsampled, rate = _unsampled_loss(losses, event), _rate(event)
    second = _above(-unsampled, event, strict=False)
    return rate * _below(unsampled, event, strict=False) + (1 - rate) * second, second


def _exceeding(losses: np.ndarray, event: LossEvent) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities of more than these losses, under P and under Q."""
    unsampled, rate = _unsampled_loss(losses, event), _rate(event)
    second = _below(-unsampled, event, strict=True)
    return rate * _above(unsampled, event, strict=True) + (1 - rate) * second, second


def _below(losses: np.ndarray, event: LossEvent, *, strict: bool) -> np.ndarray:
    """Return the probability under P of losses up to these, without sampling. Q is the mirror image of P."""
    from scipy.special import ndtr

    largest = _largest_loss(event)
    if isinstance(event, Event):
        noise = event.noise_multiplier
        return np.asarray(ndtr(losses * noise - 1 / (2 * noise)))
    if isinstance(event, LaplaceEvent):
        inner = 0.5 * np.exp((np.clip(losses, -largest, largest) - largest) / 2)
    else:
        inner = np.full(np.shape(losses), 1 / (1 + exp(largest)))
    none = losses <= -largest if strict else losses < -largest
    every = losses > largest if strict else losses >= largest
    return np.where(none, 0.0, np.where(every, 1.0, inner))


def _above(losses: np.ndarray, event: LossEvent, *, strict: bool) -> np.ndarray:
    """Return the probability under P of losses from these, without sampling."""
    from scipy.special import ndtr

    if isinstance(event, Event):
        noise = event.noise_multiplier
        return np.asarray(ndtr(1 / (2 * noise) - losses * noise))
    return np.asarray(1 - _below(losses, event, strict=not strict))


def _largest_loss(event: LossEvent) -> float:
    """Return the largest loss of a release without sampling; for Gaussian noise, one with a negligible tail."""
    if isinstance(event, EpsilonDeltaEvent):
        return event.epsilon
    largest = 1 / event.noise_multiplier
    return largest if isinstance(event, LaplaceEvent) else largest**2 / 2 + TAIL_SCORE * largest


def _rate(event: LossEvent) -> float:
    return 1.0 if isinstance(event, EpsilonDeltaEvent) else event.rate


def _is_fixed_size(event: LossEvent) -> bool:
    return not isinstance(event, EpsilonDeltaEvent) and event.sampling == "fixed_size"


def _sampled_loss(unsampled: np.ndarray, event: LossEvent) -> np.ndarray:
    """Return ``log(1 - q + q exp(loss))``."""
    rate = _rate(event)
    return unsampled if rate == 1 else np.logaddexp(log1p(-rate), log(rate) + unsampled)


def _unsampled_loss(losses: np.ndarray, event: LossEvent) -> np.ndarray:
    """Return the inverse of `_sampled_loss`; minus infinity below its range."""
    rate = _rate(event)
    if rate == 1:
        return losses
    with np.errstate(divide="ignore", over="ignore"):
        return np.log1p(np.maximum(np.expm1(losses) / rate, -1.0))


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
