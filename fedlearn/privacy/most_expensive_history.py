"""Find the history with the largest epsilon among thousands, by a best-first search.

A set of histories is bounded by one history that is worse than all of them. The set with the largest bound is divided
until it has one history, and the epsilon of this history is larger than all other bounds.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Sequence

from fedlearn.core.privacy_ledger import AnyEvent, Event, EventHistory, LaplaceEvent, event_history

EpsilonOf = Callable[[EventHistory, float], float]  # (history, delta) -> epsilon


def undominated_histories(histories: Iterable[EventHistory]) -> list[EventHistory]:
    """Return histories that include the most expensive one, ordered so that the search merges similar ones.

    A history of equal events is left out if another one has the same noise, no lower sampling rate and no fewer events.
    """
    families: dict[Hashable, list[EventHistory]] = {}
    several = []
    for history in {history for history in histories if history}:
        if len(history) > 1:
            several.append(history)
        else:
            families.setdefault(_family(history[0][0]), []).append(history)
    kept = [history for family in families.values() for history in _undominated(family)]
    return sorted([*several, *kept], key=_worst_rate)


def _family(event: AnyEvent) -> Hashable:
    """Return a key of the events that differ only in their sampling rate."""
    if isinstance(event, Event | LaplaceEvent):
        return type(event), event.noise_multiplier, event.sampling == "fixed_size"
    return event


def _undominated(family: Sequence[EventHistory]) -> list[EventHistory]:
    kept: list[EventHistory] = []
    for history in sorted(family, key=_worst_rate, reverse=True):
        if not kept or history[0][1] > kept[-1][0][1]:
            kept.append(history)
    return kept


def _worst_rate(history: EventHistory) -> tuple[float, int]:
    sampled = (event.rate for event, _ in history if isinstance(event, Event | LaplaceEvent))
    return max(sampled, default=1.0), sum(count for _, count in history)


def _can_merge(history: EventHistory) -> bool:
    """Return whether `_worst_case` can bound this history together with others."""
    return all(isinstance(event, Event) and event.sampling != "fixed_size" for event, _ in history)


def most_expensive_history(
    ordered: Sequence[EventHistory], delta: float, *, bound: EpsilonOf, tight: EpsilonOf
) -> tuple[float, EventHistory]:
    """Return the largest epsilon and its history. A cheap bound ranks sets of histories, so few are computed.

    Args:
        ordered: histories from `undominated_histories`, not empty.
        delta: in (0, 1).
        bound: upper bound on ``tight``, which ranks sets.
        tight: epsilon of a history.
    """

    def ranked(low: int, high: int) -> tuple[float, bool, int, int]:
        return -bound(_worst_case(ordered[low:high]), delta), False, low, high

    merges = all(map(_can_merge, ordered))
    heap = [ranked(0, len(ordered))] if merges else [ranked(i, i + 1) for i in range(len(ordered))]
    heapq.heapify(heap)
    while True:
        top, decided, low, high = heapq.heappop(heap)
        if decided:
            return -top, ordered[low]
        if high - low == 1:
            heapq.heappush(heap, (-tight(ordered[low], delta), True, low, high))
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
