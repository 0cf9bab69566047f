"""Privacy loss distributions on a grid, and their composition.

The privacy loss of an output is the log of the ratio of its two probabilities: P with the record, Q without it. The
distribution of the loss under P determines delta for each epsilon, also after composition, because losses add up.

Each distribution here belongs to a pair (P, Q) that **dominates** the mechanism. Its delta is at least the delta of any
two neighboring data sets, for each epsilon, also a negative one. Dominating pairs compose, also for adaptive mechanisms
(Zhu, Dong, Wang). Losses are moved to a grid in such a way that the result dominates the pair (Doroshenko et al.). So a
coarse grid gives a cheap upper bound, and a fine grid gives a tight one.

**Poisson sampling** with rate q; a record is added or removed. The pairs are ``((1 - q) Q + q P, Q)`` and its mirror
image. Each composes by itself, and the larger delta counts.

**Sampling without replacement** with rate q; a record is replaced. The decision note
``docs/decisions/011-privacy-accounting.md`` has the proof. The pair equals its mirror image. Its positive losses are
the losses of ``((1 - q) Q + q P, Q)``. The rest of the probability has loss 0.

References: Zhu, Dong, Wang, *Optimal Accounting of Differential Privacy via Characteristic Function*, AISTATS 2022,
arXiv:2106.08567; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, *Connect the Dots*, PETS 2022, arXiv:2207.04380;
Koskela, Jälkö, Honkela, *Computing Tight Differential Privacy Guarantees Using FFT*, AISTATS 2020, arXiv:1906.03049.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, exp, expm1, floor, log, log1p, sqrt

import numpy as np

from fedlearn.core.privacy_ledger import EpsilonDeltaEvent, Event, LaplaceEvent

LossEvent = Event | LaplaceEvent | EpsilonDeltaEvent
MAX_LOSS = 600.0  # larger losses count as infinite, because their exponentials overflow
TAIL_SCORE = 9.0  # normal score at which the noise of a release is cut off; the probability of this tail is 1e-19


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
    high = ceil(largest_loss(event) / step)
    if _is_fixed_size(event):
        return (_mirrored(event, high, step),)
    low = floor(max(float(_sampled_loss(np.array(-_largest_loss(event)), event)), -MAX_LOSS) / step)
    edges = step * np.arange(low, high + 1)
    first, second = _interval_masses(edges, event)
    removed = _connect_dots(low, step, first, second)
    if _rate(event) == 1:
        return (removed,)
    return removed, _connect_dots(-high, step, second[::-1], first[::-1])


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


def largest_loss(event: LossEvent) -> float:
    """Return the largest finite loss of one release; larger ones count as infinite."""
    return min(float(_sampled_loss(np.array(_largest_loss(event)), event)), MAX_LOSS)


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
