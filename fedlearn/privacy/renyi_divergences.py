"""Epsilon from Renyi divergences, which add up over the releases of a history.

References: Mironov, *Renyi Differential Privacy*, CSF 2017, arXiv:1702.07476; Mironov, Talwar, Zhang, *Rényi
Differential Privacy of the Sampled Gaussian Mechanism*, 2019, arXiv:1908.10530; Canonne, Kamath, Steinke, *The Discrete
Gaussian for Differential Privacy*, NeurIPS 2020, arXiv:2004.00010.
"""

from __future__ import annotations

from functools import lru_cache
from math import erf, expm1, inf, log, log1p, pi, sqrt

import numpy as np

from fedlearn.core.privacy_ledger import AnyEvent, EpsilonDeltaEvent, Event, EventHistory, LaplaceEvent, RenyiEvent

ORDERS = np.array([1 + x / 10 for x in range(1, 100)] + [*range(11, 64), 128, 256, 512, 1024], np.float64)

MIN_NOISE = 1e-6  # an epsilon above 10^11 is infinite here
MIN_SAMPLED_NOISE = 0.02  # below it, the grid is too large, and the bound ignores the sampling


@lru_cache(maxsize=4096)
def rdp_epsilon(history: EventHistory, delta: float) -> float:
    """Return the smaller of two bounds: Renyi divergences alone, or pure epsilons plus the divergences of the rest.

    Args:
        history: events with their counts, not empty.
        delta: in (0, 1); the deltas of the events are not subtracted.
    """
    whole = _composed_epsilon(history, delta)
    pure = sum(count * pure_epsilon(event) for event, count in history if pure_epsilon(event) < inf)
    if not pure:
        return whole
    rest = tuple((event, count) for event, count in history if pure_epsilon(event) == inf)
    return min(whole, pure + (_composed_epsilon(rest, delta) if rest else 0.0))


def pure_epsilon(event: AnyEvent) -> float:
    """Return the epsilon at delta 0, with amplification and without the delta of the event; infinite if none exists."""
    if isinstance(event, EpsilonDeltaEvent):
        return event.epsilon
    if isinstance(event, LaplaceEvent):
        epsilon = 1 / event.noise_multiplier
        return log1p(event.rate * expm1(epsilon)) if event.rate < 1 and epsilon < 700 else epsilon
    return inf


def _composed_epsilon(history: EventHistory, delta: float) -> float:
    """Return the epsilon of composed divergences: the least bound of all orders (Canonne, Kamath, Steinke, Prop. 12).

    A total variation of at most delta, which follows from a small divergence by the inequality of Bretagnolle and
    Huber, gives epsilon 0.
    """
    total = np.sum([count * divergences(event) for event, count in history], axis=0)
    if np.any(delta**2 + np.expm1(-total) > 0):
        return 0.0
    return float(max(0.0, np.min(total + np.log1p(-1 / ORDERS) - np.log(delta * ORDERS) / (ORDERS - 1))))


@lru_cache(maxsize=4096)
def divergences(event: AnyEvent) -> np.ndarray:
    """Return the Renyi divergences of one release at `ORDERS`, the larger of both directions."""
    if isinstance(event, RenyiEvent):
        return _stated_divergences(event)
    if isinstance(event, Event):
        noise, rate = event.noise_multiplier, event.rate
        if noise < MIN_NOISE:
            return np.full(len(ORDERS), inf)
        if rate == 1 or noise < MIN_SAMPLED_NOISE:
            return ORDERS / 2 / noise / noise  # sampling never raises a divergence
        divergence = _fixed_size_gaussian if event.sampling == "fixed_size" else _poisson_gaussian
        return np.array([divergence(noise, rate, order) for order in ORDERS])
    pure = _randomized_response(pure_epsilon(event))
    return np.minimum(_laplace(event.noise_multiplier), pure) if isinstance(event, LaplaceEvent) else pure


def _poisson_gaussian(noise: float, rate: float, order: float) -> float:
    """Return the divergence of a Gaussian release with Poisson sampling, by the trapezoidal rule.

    The removal of a record has the larger divergence (Mironov, Talwar, Zhang). The integrand is analytic and decays
    like a Gaussian, so the rule has a relative error below 1e-9.
    """
    step = noise / 8
    outputs = np.arange(-10 * noise, order + 10 * noise + 1, step)
    exponents = order * _loss_of_removal(outputs, noise, rate) - outputs**2 / (2 * noise**2)
    return _log_integral(exponents, np.full(len(outputs), step / (noise * sqrt(2 * pi)))) / (order - 1)


def _fixed_size_gaussian(noise: float, rate: float, order: float) -> float:
    """Return the divergence of the dominating pair for sampling without replacement, by Gauss quadrature.

    `fedlearn.privacy.loss_distributions` describes the pair. Its positive losses are the losses of a removal, and its
    negative losses are their mirror image. The rest of the probability has loss 0.
    """
    nodes, weights = np.polynomial.legendre.leggauss(16)
    panels = np.arange(0.5, order + 10 * noise + 1, noise)
    outputs = (panels[:, None] + noise / 2 * (nodes + 1)).ravel()
    weights = np.tile(weights / sqrt(8 * pi), len(panels))
    losses = _loss_of_removal(outputs, noise, rate)
    exponents = np.logaddexp(order * losses, (1 - order) * losses) - outputs**2 / (2 * noise**2)
    without_loss = (1 - rate) * erf(1 / (noise * sqrt(8)))
    return float(np.logaddexp(_log_integral(exponents, weights), log(without_loss)) / (order - 1))


def _loss_of_removal(outputs: np.ndarray, noise: float, rate: float) -> np.ndarray:
    """Return the privacy losses of outputs if the sum moves from 0 to 1 with probability ``rate``."""
    return np.asarray(np.logaddexp(log1p(-rate), log(rate) + (2 * outputs - 1) / (2 * noise**2)))


def _log_integral(exponents: np.ndarray, weights: np.ndarray) -> float:
    top = exponents.max()
    return float(top + log((np.exp(exponents - top) * weights).sum()))


def _stated_divergences(event: RenyiEvent) -> np.ndarray:
    """Return the least bound of any stated order as large; infinite above the largest stated order."""
    bounds = np.minimum.accumulate(np.array(event.divergences)[::-1])[::-1]
    return np.append(bounds, inf)[np.searchsorted(np.array(event.orders), ORDERS)]  # the first order as large


def _laplace(noise: float) -> np.ndarray:
    """Return the divergences of a Laplace release without sampling (Mironov, Proposition 6)."""
    up = log(0.5) + np.log(ORDERS / (ORDERS - 0.5)) + (ORDERS - 1) / noise
    down = log(0.5) + np.log((ORDERS - 1) / (ORDERS - 0.5)) - ORDERS / noise
    return np.asarray(np.maximum(np.logaddexp(up, down), 0.0) / (ORDERS - 1))


def _randomized_response(epsilon: float) -> np.ndarray:
    """Return the divergences of randomized response, the largest of all epsilon-private mechanisms."""
    yes, no = -log1p(np.exp(-epsilon)), -epsilon - log1p(np.exp(-epsilon))  # logs of the two probabilities
    both = np.logaddexp(ORDERS * yes + (1 - ORDERS) * no, ORDERS * no + (1 - ORDERS) * yes)
    return np.asarray(np.maximum(both, 0.0) / (ORDERS - 1))
