"""Compute epsilon from the events of a ledger, by privacy loss distributions (PLD) and by Renyi divergences (RDP).

Only this module imports dp-accounting, when it computes the first epsilon, because the import takes a second.

| event | PLD | RDP |
|---|---|---|
| Gaussian | all sampling laws except ``fixed_size`` | all sampling laws |
| Laplace | exact; amplified epsilon for ``fixed_size`` | exact without sampling, else amplified epsilon |
| (epsilon, delta) | randomized response, which dominates all such mechanisms | randomized response |
| Renyi divergences | none | the divergences of the event |

The delta of an event is subtracted from the delta of the guarantee. This is valid because a mechanism is
(epsilon, delta)-private if it is epsilon-private except with probability delta. Basic composition, which adds pure
epsilons, gives another bound. The smallest bound is used.

References: Kairouz, Oh, Viswanath, *The Composition Theorem for Differential Privacy*, ICML 2015, arXiv:1311.0776
(randomized response dominates); Balle, Barthe, Gaboardi, *Privacy Amplification by Subsampling*, NeurIPS 2018,
arXiv:1807.01647; Koskela, Jälkö, Honkela, *Computing Tight Differential Privacy Guarantees Using FFT*, AISTATS 2020,
arXiv:1906.03049; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, *Connect the Dots*, PETS 2022, arXiv:2207.04380;
Mironov, Talwar, Zhang, *Rényi Differential Privacy of the Sampled Gaussian Mechanism*, 2019, arXiv:1908.10530.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import expm1, inf, isfinite, log, log1p, sqrt
from typing import Any

import numpy as np

from fedlearn.core.privacy_ledger import (
    AnyEvent,
    Epsilon,
    EpsilonDeltaEvent,
    Event,
    EventHistory,
    LaplaceEvent,
    RenyiEvent,
    event_history,
)
from fedlearn.errors import MissingExtra, is_number, require

PLD_DISCRETIZATION_INTERVAL = 1e-4  # step of the grid of privacy losses, rounded up: a coarser grid raises epsilon
MAX_PLD_EPSILON = 100.0  # above this a tighter bound has no practical value, and its grid needs gigabytes


def require_delta(delta: float, setting: str = "delta") -> None:
    """Raise a `SettingError` unless ``delta`` is in (0, 1). NaN is outside."""
    ok = is_number(delta, at_least=0, below=1) and delta > 0
    require(ok, setting, delta, "a number in (0, 1), below 1 over the number of clients", f"{setting}=1e-5")


@lru_cache(maxsize=4096)
def epsilon_bounds(history: EventHistory, *, delta: float) -> Epsilon:
    """Return upper bounds on the epsilon of all releases of a history together.

    Args:
        history: events with their counts.
        delta: in (0, 1).

    *Guarantees*: an empty history has epsilon 0. The result depends only on the multiset of events, so a ledger from a
    checkpoint has the same epsilon. ``count`` equal events take one self-composition, not ``count`` convolutions.

    Raises:
        MissingExtra: The package dp-accounting is not installed.
        SettingError: ``delta`` is not in (0, 1).
    """
    require_delta(delta)
    if not history:
        return Epsilon(0.0, 0.0)
    rdp = _rdp_epsilon(history, delta)
    if not _has_loss_distributions(history):
        return Epsilon(None, rdp)
    return Epsilon(_pld_epsilon(history, delta) if rdp < MAX_PLD_EPSILON else rdp, rdp)


def _has_loss_distributions(history: EventHistory) -> bool:
    return all(not isinstance(event, RenyiEvent) and not _is_fixed_size_gaussian(event) for event, _ in history)


def _is_fixed_size_gaussian(event: AnyEvent) -> bool:
    return isinstance(event, Event) and event.sampling == "fixed_size"


def max_epsilon_bounds(histories: Iterable[EventHistory], *, delta: float) -> Epsilon:
    """Return the largest epsilon of many histories, for clients that pay for their own rounds.

    The data of clients are disjoint, so the epsilon of a record is the epsilon of its client. The federation has the
    maximum, not the sum. A best-first search bounds each set of histories by a history that is worse than all of them.
    So it computes the epsilons of a few dozen histories out of thousands.

    Args:
        histories: histories of the clients.
        delta: in (0, 1).
    """
    ordered = _candidates(histories)
    if not ordered:
        return Epsilon(0.0, 0.0)
    rdp = _search(ordered, delta, tight=_rdp_epsilon)
    if not all(map(_has_loss_distributions, ordered)):
        return Epsilon(None, rdp)
    return Epsilon(
        _search(ordered, delta, tight=lambda history, delta: epsilon_bounds(history, delta=delta).value), rdp
    )


def calibrate_noise_multiplier(
    histories_of: Callable[[float], Sequence[EventHistory]], *, epsilon: float, delta: float, method: str = "pld"
) -> float:
    """Return the smallest noise multiplier with which no history costs more than ``epsilon``.

    Args:
        histories_of: function from a noise multiplier to the histories of all clients.
        epsilon: budget, > 0.
        delta: in (0, 1).
        method: ``pld``, or ``rdp`` to calibrate by Renyi divergences alone.

    *Guarantees*: the result satisfies the budget and has a relative error of at most 1e-5, on the side of more noise.
    """
    require_epsilon(epsilon)
    require_delta(delta)

    def excess(noise: float, by: str) -> float:
        histories = histories_of(noise)
        bounds = max_epsilon_bounds(histories, delta=delta) if by == "pld" else _by_rdp(histories, delta)
        value = bounds.value if by == "pld" else bounds.rdp
        return log(max(value, 1e-12)) - log(epsilon) if isfinite(value) else 50.0

    high = _root(lambda noise: excess(noise, "rdp"), 0.5, 1.0)
    return high if method == "rdp" else _root(lambda noise: excess(noise, "pld"), 0.8 * high, high)


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


def require_epsilon(epsilon: float, setting: str = "epsilon") -> None:
    """Raise a `SettingError` unless ``epsilon`` is a finite number > 0. NaN is not finite."""
    ok = is_number(epsilon, at_least=0) and 0 < epsilon < inf
    require(ok, setting, epsilon, "a finite number > 0", f"{setting}=2.0")


def _candidates(histories: Iterable[EventHistory]) -> list[EventHistory]:
    """Return histories that include the most expensive one, ordered so that the search merges similar ones."""
    most: dict[frozenset[AnyEvent], EventHistory] = {}
    rest = []
    for history in {history for history in histories if history}:
        if len(history) > 1:
            rest.append(history)
        else:  # only the highest count of equal events can be the most expensive
            ((event, count),) = history
            known = most.setdefault(frozenset([event]), history)
            if count > known[0][1]:
                most[frozenset([event])] = history
    return sorted([*rest, *most.values()], key=_worst_rate)


def _worst_rate(history: EventHistory) -> tuple[float, int]:
    sampled = (event.rate for event, _ in history if isinstance(event, Event | LaplaceEvent))
    return max(sampled, default=1.0), sum(count for _, count in history)


def _can_merge(history: EventHistory) -> bool:
    """Return whether `_worst_case` can bound this history together with others."""
    return all(isinstance(event, Event) and event.sampling != "fixed_size" for event, _ in history)


def _search(ordered: Sequence[EventHistory], delta: float, *, tight: Callable[[EventHistory, float], float]) -> float:
    """Return the largest tight bound. The cheap RDP bound ranks the sets, so few tight bounds are computed."""

    def ranked(low: int, high: int) -> tuple[float, bool, int, int]:
        return -_rdp_epsilon(_worst_case(ordered[low:high]), delta), False, low, high

    merges = all(map(_can_merge, ordered))
    heap = [ranked(0, len(ordered))] if merges else [ranked(i, i + 1) for i in range(len(ordered))]
    heapq.heapify(heap)
    while True:
        top, decided, low, high = heapq.heappop(heap)
        if not decided:
            value = tight(_worst_case(ordered[low:high]), delta)
            heapq.heappush(heap, (max(top, -value), True, low, high))
        elif high - low == 1:
            return -top
        else:
            middle = (low + high) // 2
            for part in (ranked(low, middle), ranked(middle, high)):
                heapq.heappush(heap, part)


def _worst_case(histories: Sequence[EventHistory]) -> EventHistory:
    """Return a history that costs at least as much as each one: least noise, highest rate, most releases."""
    if len(histories) == 1:
        return histories[0]
    events = [event for history in histories for event, _ in history if isinstance(event, Event)]
    rate = max(event.rate for event in events)
    worst = Event(min(event.noise_multiplier for event in events), "poisson" if rate < 1 else "none", rate)
    return event_history({worst: max(sum(count for _, count in history) for history in histories)})


def _by_rdp(histories: Iterable[EventHistory], delta: float) -> Epsilon:
    ordered = _candidates(histories)
    return Epsilon(None, _search(ordered, delta, tight=_rdp_epsilon) if ordered else 0.0)


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    """Return the root of a decreasing function, on the side where the function is at most 0."""
    from scipy.optimize import brentq

    while excess(high) > 0:
        low, high = high, 2 * high
    while excess(low) <= 0:
        low, high = 0.8 * low, low
        if low < 1e-3:
            return high
    root = float(brentq(excess, low, high, xtol=1e-9, rtol=1e-6))
    while excess(root) > 0:
        root *= 1 + 1e-6
    return root


def _remaining_delta(history: EventHistory, delta: float) -> float:
    """Return the delta that remains after the deltas of the events; 0 or less if they exceed it."""
    stated = ((event, count) for event, count in history if isinstance(event, EpsilonDeltaEvent) and event.delta)
    log_survival = sum(count * log1p(-event.delta) for event, count in stated)
    return delta if log_survival == 0 else -expm1(log1p(-delta) - log_survival)


def _pure_epsilon(event: AnyEvent) -> float:
    """Return the epsilon at delta 0, with amplification and without the delta of the event; infinite if none exists."""
    if isinstance(event, EpsilonDeltaEvent):
        return event.epsilon
    if isinstance(event, LaplaceEvent):
        epsilon = 1 / event.noise_multiplier
        return log1p(event.rate * expm1(epsilon)) if event.rate < 1 and epsilon < 700 else epsilon
    return inf


def _pld_epsilon(history: EventHistory, delta: float) -> float:
    accounting, delta = _dp_accounting(), _remaining_delta(history, delta)
    if delta <= 0:
        return inf
    gaussians = [(event, count) for event, count in history if isinstance(event, Event) and event.rate == 1]
    gaussian = sum(count / event.noise_multiplier**2 for event, count in gaussians)
    others = [item for item in history if item not in gaussians]
    if not others:  # the exact curve of Balle and Wang, ICML 2018
        return float(accounting.get_epsilon_gaussian(1 / sqrt(gaussian), delta))
    composed: Any = None
    for event, count in others:
        distribution = _loss_distribution(event).self_compose(count)
        composed = distribution if composed is None else composed.compose(distribution)
    if gaussian:
        composed = composed.compose(_loss_distribution(Event(1 / sqrt(gaussian))))
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _loss_distribution(event: AnyEvent) -> Any:
    """Return the loss distribution of one release, for one record added or removed, with Poisson amplification."""
    _dp_accounting()
    from dp_accounting.pld import common
    from dp_accounting.pld import privacy_loss_distribution as distributions

    grid: dict[str, Any] = {"value_discretization_interval": PLD_DISCRETIZATION_INTERVAL}
    if isinstance(event, Event):
        return distributions.from_gaussian_mechanism(event.noise_multiplier, sampling_prob=event.rate, **grid)
    if isinstance(event, LaplaceEvent) and (event.sampling != "fixed_size" or event.rate == 1):
        return distributions.from_laplace_mechanism(event.noise_multiplier, sampling_prob=event.rate, **grid)
    pure = common.DifferentialPrivacyParameters(_pure_epsilon(event), 0.0)
    return distributions.from_privacy_parameters(pure, **grid)


@lru_cache(maxsize=4096)
def _rdp_epsilon(history: EventHistory, delta: float) -> float:
    """Return the smaller of two bounds: Renyi divergences alone, or pure epsilons plus the divergences of the rest."""
    delta = _remaining_delta(history, delta)
    if delta <= 0:
        return inf
    whole = _composed_rdp_epsilon(history, delta)
    pure = sum(count * _pure_epsilon(event) for event, count in history if _pure_epsilon(event) < inf)
    if not pure:
        return whole
    rest = tuple((event, count) for event, count in history if _pure_epsilon(event) == inf)
    return min(whole, pure + (_composed_rdp_epsilon(rest, delta) if rest else 0.0))


def _composed_rdp_epsilon(history: EventHistory, delta: float) -> float:
    _dp_accounting()
    from dp_accounting.rdp import compute_epsilon

    total = sum((count * _rdp(event)[1] for event, count in history), np.float64(0))
    return float(compute_epsilon(_rdp(history[0][0])[0], total, delta)[0])


@lru_cache(maxsize=4096)
def _rdp(event: AnyEvent) -> tuple[np.ndarray, np.ndarray]:
    """Return orders and Renyi divergences of one release.

    The accountants of dp-accounting interpret a noise multiplier under replacement differently. The PLD accountant
    doubles the sensitivity; the RDP accountant does not. Our multiplier is relative to the sensitivity under the
    adjacency of the event. The RDP accountant expects this for both adjacencies.
    """
    accounting = _dp_accounting()
    from dp_accounting.rdp import RdpAccountant

    if isinstance(event, RenyiEvent):
        orders = RdpAccountant().orders
        return orders, _stated_divergences(event, orders)
    relation, release = accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, None
    if isinstance(event, Event):
        release = accounting.GaussianDpEvent(event.noise_multiplier)
        if event.sampling == "poisson":
            release = accounting.PoissonSampledDpEvent(event.rate, release)
        elif event.sampling == "fixed_size":
            relation = accounting.NeighboringRelation.REPLACE_ONE
            release = accounting.SampledWithoutReplacementDpEvent(1, event.rate, release)  # only their ratio is used
    elif isinstance(event, LaplaceEvent):
        release = accounting.LaplaceDpEvent(event.noise_multiplier)
    accountant = RdpAccountant(neighboring_relation=relation)
    if release is not None:
        with _without_warnings():  # orders that do not converge are left out; the others still give a bound
            accountant.compose(release)
    if isinstance(event, Event):
        return accountant.orders, accountant.rdp
    pure = _randomized_response_divergences(_pure_epsilon(event), accountant.orders)
    return accountant.orders, np.minimum(accountant.rdp, pure) if release is not None else pure


def _stated_divergences(event: RenyiEvent, orders: np.ndarray) -> np.ndarray:
    """Return bounds at these orders: the least bound of any order as large; infinite above the largest order."""
    stated, bounds = np.array(event.orders), np.minimum.accumulate(np.array(event.divergences)[::-1])[::-1]
    place = np.searchsorted(stated, orders)  # the first stated order >= the order
    return np.append(bounds, inf)[place]


def _randomized_response_divergences(epsilon: float, orders: np.ndarray) -> np.ndarray:
    """Return the Renyi divergences of randomized response, the largest of all epsilon-private mechanisms."""
    yes, no = -log1p(np.exp(-epsilon)), -epsilon - log1p(np.exp(-epsilon))  # logs of the two probabilities
    orders = np.asarray(orders, np.float64)
    both = np.logaddexp(orders * yes + (1 - orders) * no, orders * no + (1 - orders) * yes)
    return np.asarray(np.maximum(both, 0.0) / (orders - 1))


@contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _dp_accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as missing:
        raise MissingExtra("a privacy ledger", "privacy") from missing
    return dp_accounting
