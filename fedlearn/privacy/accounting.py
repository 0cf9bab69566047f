"""From what was released to epsilon: dp-accounting, by privacy loss distributions and by Renyi divergences.

The only home of dp-accounting, which is imported at the first epsilon because that takes a second.

References: Koskela, Jälkö, Honkela, *Computing Tight Differential Privacy Guarantees Using FFT*, AISTATS 2020,
arXiv:1906.03049; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, *Connect the Dots*, PETS 2022, arXiv:2207.04380;
Mironov, Talwar, Zhang, *Rényi Differential Privacy of the Sampled Gaussian Mechanism*, 2019, arXiv:1908.10530.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import inf, isfinite, log, sqrt
from typing import Any

import numpy as np

from fedlearn.core.privacy_ledger import Epsilon, Event, EventHistory, Sampling, event_history
from fedlearn.errors import MissingExtra, is_number, require

RDP_ONLY_SAMPLINGS = ("fixed_size", "renyi")  # laws for which there is no privacy loss distribution
PLD_DISCRETIZATION_INTERVAL = (
    1e-4  # of the grid of privacy losses; rounding is upwards, so that a coarser grid would only claim more
)
MAX_PLD_EPSILON = 100.0  # above this a tighter bound promises nothing either, and its grid would take gigabytes


def require_delta(delta: float, setting: str = "delta") -> None:
    """Raise a `SettingError` unless ``delta`` is in (0, 1); NaN is not."""
    ok = is_number(delta, at_least=0, below=1) and delta > 0
    require(ok, setting, delta, "a number in (0, 1), below 1 over the number of clients", f"{setting}=1e-5")


@lru_cache(maxsize=4096)
def epsilon_bounds(history: EventHistory, *, delta: float) -> Epsilon:
    """Upper bounds on epsilon of all releases of a history together.

    *Guarantees*: 0 for an empty history; a function of the multiset of events alone, so that a ledger restored from a
    checkpoint has the same epsilon; ``count`` equal events take one self-composition, not ``count`` convolutions.

    Raises:
        MissingExtra: dp-accounting is not installed.
        SettingError: ``delta`` is not in (0, 1).
    """
    require_delta(delta)
    if not history:
        return Epsilon(0.0, 0.0)
    rdp = _rdp_epsilon(history, delta)
    if any(event.sampling in RDP_ONLY_SAMPLINGS for event, _ in history):
        return Epsilon(None, rdp)
    return Epsilon(_pld_epsilon(history, delta) if rdp < MAX_PLD_EPSILON else rdp, rdp)


def max_epsilon_bounds(histories: Iterable[EventHistory], *, delta: float) -> Epsilon:
    """The largest epsilon of many histories: what a federation may claim whose clients pay for themselves.

    Data of clients are disjoint, so the claim for any one record is the one of the client that holds it: a maximum,
    never a sum. The search is best-first over sets of histories, each bounded by a history worse than all of the set,
    so that a few dozen of thousands are computed.
    """
    ordered = sorted({history for history in histories if history}, key=_worst_rate)
    if not ordered:
        return Epsilon(0.0, 0.0)
    rdp = _search(ordered, delta, tight=_rdp_epsilon)
    if any(event.sampling in RDP_ONLY_SAMPLINGS for history in ordered for event, _ in history):
        return Epsilon(None, rdp)
    return Epsilon(
        _search(ordered, delta, tight=lambda history, delta: epsilon_bounds(history, delta=delta).value), rdp
    )


def calibrate_noise_multiplier(
    histories_of: Callable[[float], Sequence[EventHistory]], *, epsilon: float, delta: float, method: str = "pld"
) -> float:
    """The smallest noise multiplier, up to 1e-5 of it, at which no history costs more than ``epsilon``.

    Args:
        histories_of: from a noise multiplier to all that would be released.
        epsilon: > 0.
        delta: in (0, 1).
        method: ``pld``, or ``rdp`` to calibrate by Renyi divergences alone.

    *Guarantees*: the result satisfies the budget; calibration errs to the side of more noise.
    """
    require_epsilon(epsilon)
    require_delta(delta)

    def excess(noise: float, by: str) -> float:
        seen = (
            max_epsilon_bounds(histories_of(noise), delta=delta) if by == "pld" else _by_rdp(histories_of(noise), delta)
        )
        value = seen.value if by == "pld" else seen.rdp
        return log(max(value, 1e-12)) - log(epsilon) if isfinite(value) else 50.0

    high = _root(lambda noise: excess(noise, "rdp"), 0.5, 1.0)
    return high if method == "rdp" else _root(lambda noise: excess(noise, "pld"), 0.8 * high, high)


def calibrate_num_rounds(
    histories_of: Callable[[int], Sequence[EventHistory]], *, epsilon: float, delta: float, max_rounds: int
) -> int:
    """The largest number of rounds, at most ``max_rounds``, that costs no more than ``epsilon``; 0 if there is none."""
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
    """Raise a `SettingError` unless ``epsilon`` is a finite number > 0; NaN is not."""
    ok = is_number(epsilon, at_least=0) and 0 < epsilon < inf
    require(ok, setting, epsilon, "a finite number > 0", f"{setting}=2.0")


def _worst_rate(history: EventHistory) -> tuple[float, int]:
    return max(event.rate for event, _ in history), sum(count for _, count in history)


def _search(ordered: Sequence[EventHistory], delta: float, *, tight: Callable[[EventHistory, float], float]) -> float:
    """The cheap bound ranks sets, the tight one decides: it is computed for what comes out on top only."""

    def ranked(low: int, high: int) -> tuple[float, bool, int, int]:
        return -_rdp_epsilon(_worse_than(ordered[low:high]), delta), False, low, high

    heap = [ranked(0, len(ordered))]
    while True:
        top, decided, low, high = heapq.heappop(heap)
        if not decided:
            value = tight(_worse_than(ordered[low:high]), delta)
            heapq.heappush(heap, (max(top, -value), True, low, high))
        elif high - low == 1:
            return -top
        else:
            middle = (low + high) // 2
            for part in (ranked(low, middle), ranked(middle, high)):
                heapq.heappush(heap, part)


def _worse_than(histories: Sequence[EventHistory]) -> EventHistory:
    """A history that costs at least as much as each of these: the least noise, the highest rate, the most releases."""
    if len(histories) == 1:
        return histories[0]
    events = [event for history in histories for event, _ in history]
    assert all(event.sampling != "fixed_size" for event in events), (
        "clients pay for their own events, which are not that"
    )
    rate = max(event.rate for event in events)
    law: Sampling = "renyi" if any(event.sampling == "renyi" for event in events) else "none"
    worst = Event(min(event.noise_multiplier for event in events), "poisson" if rate < 1 else law, rate)
    return event_history({worst: max(sum(count for _, count in history) for history in histories)})


def _by_rdp(histories: Iterable[EventHistory], delta: float) -> Epsilon:
    ordered = sorted({history for history in histories if history}, key=_worst_rate)
    return Epsilon(None, _search(ordered, delta, tight=_rdp_epsilon) if ordered else 0.0)


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    """Where a decreasing function reaches 0, from the side where it is at most 0."""
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


def _pld_epsilon(history: EventHistory, delta: float) -> float:
    accounting = _dp_accounting()
    gaussian = sum(count / event.noise_multiplier**2 for event, count in history if event.rate == 1)
    sampled = [(event, count) for event, count in history if event.rate < 1]
    if not sampled:  # the exact curve of Balle and Wang, ICML 2018
        return float(accounting.get_epsilon_gaussian(1 / sqrt(gaussian), delta))
    composed: Any = None
    for event, count in sampled:
        one = _loss_distribution(event.noise_multiplier, event.rate).self_compose(count)
        composed = one if composed is None else composed.compose(one)
    if gaussian:
        composed = composed.compose(_loss_distribution(1 / sqrt(gaussian), 1.0))
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _loss_distribution(noise_multiplier: float, rate: float) -> Any:
    """Of one release under adding or removing one record, which a Poisson draw is amplified for."""
    _dp_accounting()
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=rate, value_discretization_interval=PLD_DISCRETIZATION_INTERVAL
    )


@lru_cache(maxsize=4096)
def _rdp_epsilon(history: EventHistory, delta: float) -> float:
    _dp_accounting()
    from dp_accounting.rdp import compute_epsilon

    total = sum((count * _rdp(event)[1] for event, count in history), np.float64(0))
    return float(compute_epsilon(_rdp(history[0][0])[0], total, delta)[0])


@lru_cache(maxsize=4096)
def _rdp(event: Event) -> tuple[np.ndarray, np.ndarray]:
    """(orders, Renyi divergences) of one release.

    dp-accounting's accountants read a noise multiplier under replacement in two ways (that of loss distributions
    doubles the sensitivity, this one does not). Ours is relative to the sensitivity under the stated adjacency, which
    is what this one expects under either.
    """
    accounting = _dp_accounting()
    from dp_accounting.rdp import RdpAccountant

    release: Any = accounting.GaussianDpEvent(event.noise_multiplier)
    relation = accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    if event.sampling == "poisson":
        release = accounting.PoissonSampledDpEvent(event.rate, release)
    elif event.sampling == "fixed_size":
        relation = accounting.NeighboringRelation.REPLACE_ONE
        release = accounting.SampledWithoutReplacementDpEvent(1, event.rate, release)  # only their ratio is used
    with _without_warnings():  # of orders that do not converge and are left out: what remains is a bound all the same
        accountant = RdpAccountant(neighboring_relation=relation).compose(release)
    if event.sampling == "renyi":  # known at whole orders, and no larger at smaller ones
        return accountant.orders, np.ceil(accountant.orders) / (2 * event.noise_multiplier**2)
    return accountant.orders, accountant.rdp


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
