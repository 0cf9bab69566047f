"""What has been released, as data: events that a run has paid for, for the federation and for each client.

Nothing here computes an epsilon (`fedlearn.privacy.accounting` does), so that a ledger can be read, saved and carried
through a run without any accounting library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from fedlearn.errors import is_number, require

Sampling = Literal["none", "poisson", "fixed_size", "renyi"]
SAMPLINGS = ("none", "poisson", "fixed_size", "renyi")


@dataclass(frozen=True, slots=True, order=True)
class Event:
    """One release of a sum with Gaussian noise on it.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity of the sum, > 0. The sensitivity is the
            one under the adjacency that the mechanism states: ``clip`` where a record is added or removed, ``2 clip``
            where it is replaced. So an event means the same whichever accountant reads it.
        sampling: how the records of the sum were drawn. ``poisson``: each by itself with probability ``rate``;
            ``fixed_size``: that share of them, without replacement (adjacency is then replacement); ``none``: anyhow;
            ``renyi``: anyhow, and the noise is no Gaussian but one whose Renyi divergences of whole orders are at most
            those of this Gaussian, which is all that is known of it.
        rate: in (0, 1]; 1 for ``none`` and ``renyi``.

    Raises:
        SettingError: a number is out of range or NaN.
    """

    noise_multiplier: float
    sampling: Sampling = "none"
    rate: float = 1.0

    def __post_init__(self) -> None:
        noise, rate = self.noise_multiplier, self.rate
        positive = is_number(noise, at_least=0) and 0 < noise < float("inf")
        require(positive, "noise_multiplier", noise, "a finite number > 0", "noise_multiplier=1.0")
        require(is_number(rate, at_least=0) and 0 < rate <= 1, "rate", rate, "a share in (0, 1]", "rate=0.01")
        known = self.sampling in SAMPLINGS
        require(known, "sampling", self.sampling, f"one of {', '.join(SAMPLINGS)}", "sampling=poisson")


EventHistory = tuple[tuple[Event, int], ...]  # how often each event, in ascending order of events


def event_history(counts: Mapping[Event, int]) -> EventHistory:
    """Counts of events in the one form that ledgers and accountants compare."""
    return tuple(sorted((event, count) for event, count in counts.items() if count > 0))


class Epsilon(NamedTuple):
    """Upper bounds on epsilon at one delta.

    Attributes:
        pld: from privacy loss distributions; None where the sampling law has none.
        rdp: from Renyi differential privacy, as a check beside it.
    """

    pld: float | None
    rdp: float

    @property
    def value(self) -> float:
        """The bound to quote: ``pld``, or ``rdp`` where that is all there is."""
        return self.rdp if self.pld is None or self.pld == float("inf") else self.pld


@dataclass(frozen=True)
class Ledger:
    """All that a run has paid for. Charging returns a new ledger; what was is not changed.

    Attributes:
        federation: events that touched whoever took part, e.g. a noisy mean of clients.
        groups: histories of clients that pay for themselves, each once.
        clients: client -> number of its history in ``groups``; absent: nothing spent. A million clients share a few
            histories.
    """

    federation: EventHistory = ()
    groups: tuple[EventHistory, ...] = ()
    clients: Mapping[int, int] = field(default_factory=dict)

    def charge_federation(self, event: Event, count: int = 1) -> Ledger:
        """With ``count`` more releases of ``event`` by the federation."""
        return Ledger(_plus(self.federation, event, count), self.groups, self.clients)

    def replace_federation(self, event: Event) -> Ledger:
        """With ``event`` in place of all that the federation has spent: for releases that make up one event."""
        return Ledger(((event, 1),), self.groups, self.clients)

    def charge_clients(self, charges: Mapping[int, tuple[Event, int]]) -> Ledger:
        """With each client's own ``(event, count)`` added to its history; costs O(clients charged) computations."""
        groups, clients = list(self.groups), dict(self.clients)
        numbers = {history: number for number, history in enumerate(groups)}
        moves: dict[tuple[int, Event, int], int] = {}
        for client, (event, count) in charges.items():
            move = (clients.get(client, -1), event, count)
            if move not in moves:
                history = _plus(groups[move[0]] if move[0] >= 0 else (), event, count)
                moves[move] = numbers.setdefault(history, len(groups))
                groups += [history] if moves[move] == len(groups) else []
            clients[client] = moves[move]
        ledger = Ledger(self.federation, tuple(groups), clients)
        return ledger._compact() if len(groups) > 2 * len(clients) + 64 else ledger

    def _compact(self) -> Ledger:
        """Without histories that no client has any longer."""
        used = sorted(set(self.clients.values()))
        number = {old: new for new, old in enumerate(used)}
        clients = {client: number[old] for client, old in self.clients.items()}
        return Ledger(self.federation, tuple(self.groups[old] for old in used), clients)

    @cached_property
    def histories(self) -> tuple[EventHistory, ...]:
        """The histories that some client has, each once."""
        return tuple(self.groups[number] for number in sorted(set(self.clients.values())))

    def client_history(self, client: int) -> EventHistory:
        """One client's own history."""
        return self.groups[self.clients[client]] if client in self.clients else ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives the ledger back exactly."""
        members: dict[int, list[int]] = {}
        for client, number in self.clients.items():
            members.setdefault(number, []).append(int(client))
        groups = [{"spent": _rows(self.groups[number]), "clients": sorted(of)} for number, of in members.items()]
        return {"federation": _rows(self.federation), "groups": groups}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Ledger:
        """The ledger of what `to_json` returned."""
        groups = tuple(_events(group["spent"]) for group in values.get("groups", ()))
        members = (group["clients"] for group in values.get("groups", ()))
        clients = {client: number for number, of in enumerate(members) for client in of}
        return cls(_events(values.get("federation", ())), groups, clients)


def _plus(history: EventHistory, event: Event, count: int) -> EventHistory:
    counts = dict(history)
    counts[event] = counts.get(event, 0) + int(count)
    return event_history(counts)


def _rows(history: EventHistory) -> list[list[Any]]:
    return [[event.noise_multiplier, event.sampling, event.rate, count] for event, count in history]


def _events(rows: Any) -> EventHistory:
    return event_history({Event(noise, sampling, rate): count for noise, sampling, rate, count in rows})
