"""Compute epsilon from the events of a ledger, by privacy loss distributions (PLD) and by Renyi divergences (RDP).

| event | PLD | RDP |
|---|---|---|
| Gaussian | exact without sampling; with sampling, a dominating pair | the divergences of the same pair |
| Laplace | exact without sampling; with sampling, a dominating pair | exact without sampling; else amplified epsilon |
| (epsilon, delta) | randomized response, which dominates all such mechanisms | randomized response |
| Renyi divergences | none | the divergences of the event |

The delta of an event is subtracted from the delta of the guarantee. This is valid because a mechanism is
(epsilon, delta)-private if it is epsilon-private except with probability delta. Basic composition, which adds pure
epsilons, gives another bound. The smallest bound is used.

Each epsilon is an upper bound. `fedlearn.privacy.loss_distributions` has the pairs, and
`fedlearn.privacy.loss_composition` the rounding.

References: Kairouz, Oh, Viswanath, *The Composition Theorem for Differential Privacy*, ICML 2015, arXiv:1311.0776
(randomized response dominates); Balle, Wang, *Improving the Gaussian Mechanism for Differential Privacy*, ICML 2018,
arXiv:1805.06530 (the exact curve of Gaussian noise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from math import exp, expm1, inf, isfinite, log, log1p, sqrt

from fedlearn.core.privacy_ledger import AnyEvent, Epsilon, EpsilonDeltaEvent, Event, EventHistory, RenyiEvent
from fedlearn.errors import is_number, require
from fedlearn.privacy.loss_composition import composed_epsilon
from fedlearn.privacy.most_expensive_history import EpsilonOf, most_expensive_history, undominated_histories
from fedlearn.privacy.renyi_divergences import MIN_NOISE, MIN_SAMPLED_NOISE, pure_epsilon, rdp_epsilon

MAX_PURE_EPSILON = 300.0  # above it, the grid of a loss distribution is too large


def require_delta(delta: float, setting: str = "delta") -> None:
    """Raise a `SettingError` unless ``delta`` is in (0, 1). NaN is outside."""
    ok = is_number(delta, at_least=0, below=1) and delta > 0
    require(ok, setting, delta, "a number in (0, 1), below 1 over the number of clients", f"{setting}=1e-5")


def require_epsilon(epsilon: float, setting: str = "epsilon") -> None:
    """Raise a `SettingError` unless ``epsilon`` is a finite number > 0. NaN is not finite."""
    ok = is_number(epsilon, at_least=0) and 0 < epsilon < inf
    require(ok, setting, epsilon, "a finite number > 0", f"{setting}=2.0")


@lru_cache(maxsize=4096)
def epsilon_bounds(history: EventHistory, *, delta: float) -> Epsilon:
    """Return upper bounds on the epsilon of all releases of a history together.

    Args:
        history: events with their counts.
        delta: in (0, 1).

    *Guarantees*: an empty history has epsilon 0. The result depends only on the multiset of events, so a ledger from a
    checkpoint has the same epsilon.

    Raises:
        SettingError: ``delta`` is not in (0, 1).
    """
    require_delta(delta)
    if not history:
        return Epsilon(0.0, 0.0)
    rdp = _rdp_epsilon(history, delta)
    return Epsilon(_tight_epsilon(history, delta) if _has_loss_distributions(history) else None, rdp)


def max_epsilon_bounds(histories: Iterable[EventHistory], *, delta: float) -> Epsilon:
    """Return the largest epsilon of many histories, for clients that pay for their own rounds.

    The data of clients are disjoint, so the epsilon of a record is the epsilon of its client. The federation has the
    maximum, not the sum. A best-first search bounds sets of histories by a history that is worse than all of them, on a
    coarse grid. So it computes the exact epsilon of few histories out of thousands.

    Args:
        histories: histories of the clients.
        delta: in (0, 1).
    """
    require_delta(delta)
    candidates = undominated_histories(histories)
    if not candidates:
        return Epsilon(0.0, 0.0)
    rdp, _ = most_expensive_history(candidates, delta, bound=_rdp_epsilon, tight=_rdp_epsilon)
    if not all(map(_has_loss_distributions, candidates)):
        return Epsilon(None, rdp)
    pld, _ = most_expensive_history(candidates, delta, bound=_coarse_epsilon, tight=_tight_epsilon)
    return Epsilon(pld, rdp)


def calibrate_noise_multiplier(
    histories_of: Callable[[float], Sequence[EventHistory]], *, epsilon: float, delta: float, method: str = "pld"
) -> float:
    """Return the smallest noise multiplier with which no history costs more than ``epsilon``.

    The search looks at one history, the most expensive one. A check of all histories follows. If another one costs more
    than the budget, the search continues with this one.

    Args:
        histories_of: function from a noise multiplier to the histories of all clients, in the same order for each
            multiplier.
        epsilon: budget, > 0.
        delta: in (0, 1).
        method: ``pld``, or ``rdp`` to calibrate by Renyi divergences alone.

    *Guarantees*: the result satisfies the budget and has a relative error of at most 1e-5, on the side of more noise.
    """
    require_epsilon(epsilon)
    require_delta(delta)
    bound, tight = (_rdp_epsilon, _rdp_epsilon) if method == "rdp" else (_coarse_epsilon, _tight_epsilon)
    noise, place = 1.0, -1
    while True:
        histories = list(histories_of(noise))
        candidates = undominated_histories(histories)
        if not candidates:
            return noise
        cost, worst = most_expensive_history(candidates, delta, bound=bound, tight=tight if place >= 0 else bound)
        if place >= 0 and cost <= epsilon:
            return noise
        place = histories.index(worst)
        excess = partial(_excess, histories_of, place, epsilon, delta)
        noise = _root(partial(excess, bound), noise, 1.5, tolerance=1e-3)  # the cheap bound finds the range
        noise = _root(partial(excess, tight), noise, 1.03, tolerance=1e-6)


def _excess(
    histories_of: Callable[[float], Sequence[EventHistory]],
    place: int,
    epsilon: float,
    delta: float,
    epsilon_of: EpsilonOf,
    noise: float,
) -> float:
    """Return the log of the epsilon of one history, divided by the budget; 50 for an infinite epsilon."""
    value = epsilon_of(histories_of(noise)[place], delta)
    return log(max(value, 1e-12) / epsilon) if isfinite(value) else 50.0


def calibrate_num_rounds(
    histories_of: Callable[[int], Sequence[EventHistory]], *, epsilon: float, delta: float, max_rounds: int
) -> int:
    """Return the largest number of rounds that costs at most ``epsilon``; 0 if there is none.

    Args:
        histories_of: function from a number of rounds to the histories of all clients.
        epsilon: budget, > 0.
        delta: in (0, 1).
        max_rounds: largest number that is tried, >= 1.
    """
    low, high = 0, 1
    while high <= max_rounds and max_epsilon_bounds(histories_of(high), delta=delta).value <= epsilon:
        low, high = high, 2 * high
    high = min(high, max_rounds + 1)
    while high - low > 1:
        middle = (low + high) // 2
        within = max_epsilon_bounds(histories_of(middle), delta=delta).value <= epsilon
        low, high = (middle, high) if within else (low, middle)
    return low


def _root(excess: Callable[[float], float], start: float, factor: float, *, tolerance: float) -> float:
    """Return the root of a decreasing function, on the side where the function is at most 0.

    Args:
        excess: function that decreases.
        start: first try, > 0.
        factor: factor between tries until the root is between two of them, > 1.
        tolerance: relative error of the result.
    """
    high = start
    while (above := excess(high)) > 0:
        high *= factor
    low = high / factor
    while (below := excess(low)) <= 0:
        low, high, above = low / factor, low, below
        if low < 1e-3:
            return high
    while high > low * (1 + tolerance):
        middle = low * (high / low) ** min(max(below / (below - above), 0.02), 0.98)  # a secant in the logarithm
        for noise in (middle, middle * (1 + tolerance / 2), middle / (1 + tolerance / 2)):
            if low < noise < high:
                value = excess(noise)
                low, below, high, above = (noise, value, high, above) if value > 0 else (low, below, noise, value)
    return high


def _has_loss_distributions(history: EventHistory) -> bool:
    return all(not isinstance(event, RenyiEvent) for event, _ in history)


def _remaining_delta(history: EventHistory, delta: float) -> float:
    """Return the delta that remains after the deltas of the events; 0 or less if they exceed it."""
    stated = ((event, count) for event, count in history if isinstance(event, EpsilonDeltaEvent) and event.delta)
    log_survival = sum(count * log1p(-event.delta) for event, count in stated)
    return delta if log_survival == 0 else -expm1(log1p(-delta) - log_survival)


def _rdp_epsilon(history: EventHistory, delta: float) -> float:
    delta = _remaining_delta(history, delta)
    return rdp_epsilon(history, delta) if delta > 0 else inf


@lru_cache(maxsize=4096)
def _tight_epsilon(history: EventHistory, delta: float) -> float:
    """Return the value of `epsilon_bounds`. For Gaussian events it needs no divergences, which give a larger bound."""
    if not _has_loss_distributions(history):
        return _rdp_epsilon(history, delta)
    pld = _pld_epsilon(history, delta)
    is_smallest = isfinite(pld) and all(isinstance(event, Event) for event, _ in history)
    return pld if is_smallest else min(pld, _rdp_epsilon(history, delta))


@lru_cache(maxsize=4096)
def _coarse_epsilon(history: EventHistory, delta: float) -> float:
    """Return an upper bound that takes less than a millisecond."""
    if not _has_loss_distributions(history):
        return _rdp_epsilon(history, delta)
    return _pld_epsilon(history, delta, coarse=True)


def _pld_epsilon(history: EventHistory, delta: float, *, coarse: bool = False) -> float:
    delta = _remaining_delta(history, delta)
    if delta <= 0 or any(_has_too_little_noise(event) for event, _ in history):
        return inf
    precision, others = 0.0, []
    for event, count in history:
        assert not isinstance(event, RenyiEvent)
        if isinstance(event, Event) and event.rate == 1:
            precision += count / event.noise_multiplier**2
        else:
            others.append((event, count))
    if not others:
        return gaussian_epsilon(1 / sqrt(precision), delta)
    gaussian = [(Event(1 / sqrt(precision)), 1)] if precision else []
    return composed_epsilon([*others, *gaussian], delta, coarse=coarse)


def _has_too_little_noise(event: AnyEvent) -> bool:
    """Return whether a loss distribution does not fit the grid, so that only other bounds hold for the release."""
    if isinstance(event, Event):
        return event.noise_multiplier < (MIN_NOISE if event.rate == 1 else MIN_SAMPLED_NOISE)
    return MAX_PURE_EPSILON < pure_epsilon(event) < inf


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Return the smallest epsilon of one Gaussian release, from the exact curve of Balle and Wang."""
    from scipy.special import log_ndtr

    half, noise = 1 / (2 * noise_multiplier), noise_multiplier

    def delta_of(epsilon: float) -> float:
        return exp(log_ndtr(half - epsilon * noise)) - exp(epsilon + log_ndtr(-half - epsilon * noise))

    low, high = 0.0, 2 * half**2 + sqrt(2 * log(1 / delta)) / noise
    if delta_of(low) <= delta:
        return 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of(middle) <= delta else (middle, high)
    return high
