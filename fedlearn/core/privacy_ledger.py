"""The releases that a run has paid for, as data: events of the federation and of each client.

Nothing here computes an epsilon (`fedlearn.privacy.accounting` does). So a ledger is read, saved and carried through a
run without an accounting library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from fedlearn.errors import FedlearnError, is_count, is_number, require

Sampling = Literal["none", "poisson", "fixed_size"]
SAMPLINGS = ("none", "poisson", "fixed_size")
WHOLE_ORDERS = (*map(float, range(2, 65)), 128.0, 256.0, 512.0, 1024.0)  # for Renyi divergences of whole orders


class LedgerError(FedlearnError, ValueError):
    """A saved ledger is damaged or in another format."""


@dataclass(frozen=True, slots=True, order=True)
class Event:
    """Record one release of a sum with Gaussian noise.

    Args:
        noise_multiplier: standard deviation of the noise over the L2 sensitivity of the sum, > 0. The sensitivity is
            that of the adjacency which the mechanism states: ``clip`` where a record is added or removed, ``2 clip``
            where it is replaced. So an event means the same for each accountant.
        sampling: sampling law of the records of the sum. ``poisson``: each independently with probability ``rate``;
            ``fixed_size``: this share of them, without replacement (the adjacency is then replacement); ``none``: no
            assumption.
        rate: in (0, 1]; 1 for ``none``.

    Raises:
        SettingError: a number is out of range or NaN.
    """

    noise_multiplier: float
    sampling: Sampling = "none"
    rate: float = 1.0

    def __post_init__(self) -> None:
        _require_noise(self.noise_multiplier)
        _require_sampling(self.sampling, self.rate)


@dataclass(frozen=True, slots=True, order=True)
class LaplaceEvent:
    """Record one release of a sum with Laplace noise.

    Args:
        noise_multiplier: scale b of the noise (density ``exp(-|x| / b) / 2b`` in each coordinate) over the L1
            sensitivity of the sum, > 0. One release without sampling has epsilon ``1 / noise_multiplier`` and delta 0.
        sampling: see `Event`.
        rate: see `Event`.

    Raises:
        SettingError: a number is out of range or NaN.

    Reference: Dwork, McSherry, Nissim, Smith, *Calibrating Noise to Sensitivity in Private Data Analysis*, TCC 2006.
    """

    noise_multiplier: float
    sampling: Sampling = "none"
    rate: float = 1.0

    def __post_init__(self) -> None:
        _require_noise(self.noise_multiplier)
        _require_sampling(self.sampling, self.rate)


@dataclass(frozen=True, slots=True, order=True)
class EpsilonDeltaEvent:
    """Record one release of a mechanism that is only known to be (epsilon, delta)-differentially private.

    Args:
        epsilon: > 0 and finite.
        delta: in [0, 1); 0 for pure differential privacy.

    Raises:
        SettingError: a number is out of range or NaN.
    """

    epsilon: float
    delta: float = 0.0

    def __post_init__(self) -> None:
        positive = is_number(self.epsilon, at_least=0) and 0 < self.epsilon < float("inf")
        require(positive, "epsilon", self.epsilon, "a finite number > 0", "epsilon=1.0")
        require(is_number(self.delta, at_least=0, below=1), "delta", self.delta, "a number in [0, 1)", "delta=0")


@dataclass(frozen=True, slots=True, order=True)
class RenyiEvent:
    """Record one release of a mechanism that is known by bounds on its Renyi divergences.

    Args:
        orders: ascending, each > 1. The bound of an order holds for smaller orders too, because divergences increase
            with the order. Nothing is known above the largest order.
        divergences: upper bounds on the divergence of each order, in both directions, >= 0.

    Raises:
        SettingError: a number is out of range or NaN, or the lengths differ.

    Reference: Mironov, *Renyi Differential Privacy*, CSF 2017, arXiv:1702.07476.
    """

    orders: tuple[float, ...]
    divergences: tuple[float, ...]

    def __post_init__(self) -> None:
        orders, bounds = self.orders, self.divergences
        numbers = all(is_number(order, at_least=1) and 1 < order < float("inf") for order in orders)
        ascends = numbers and all(a < b for a, b in pairwise(orders))
        expected = "a tuple of ascending finite numbers > 1"
        require(isinstance(orders, tuple) and bool(orders) and ascends, "orders", orders, expected, "orders=(2.0, 4.0)")
        positive = isinstance(bounds, tuple) and all(is_number(bound, at_least=0) for bound in bounds)
        expected = "a tuple of finite numbers >= 0, one for each order"
        fits = positive and len(bounds) == len(orders)
        require(fits, "divergences", bounds, expected, "divergences=(0.5, 1.0)")


AnyEvent = Event | LaplaceEvent | EpsilonDeltaEvent | RenyiEvent
EVENT_TYPES: Mapping[str, type[AnyEvent]] = {  # the names in JSON; their order sorts histories
    "gaussian": Event,
    "laplace": LaplaceEvent,
    "epsilon_delta": EpsilonDeltaEvent,
    "renyi": RenyiEvent,
}
TYPE_NAMES = {kind: name for name, kind in EVENT_TYPES.items()}
EventHistory = tuple[tuple[AnyEvent, int], ...]  # count of each event, in ascending order of events


def event_history(counts: Mapping[Any, int]) -> EventHistory:
    """Return counts of events in the form that ledgers and accountants compare."""
    return tuple(sorted(((event, count) for event, count in counts.items() if count > 0), key=_sort_key))


def _sort_key(item: tuple[AnyEvent, int]) -> tuple[int, Any]:
    return list(TYPE_NAMES).index(type(item[0])), item


def _require_noise(noise: float) -> None:
    positive = is_number(noise, at_least=0) and 0 < noise < float("inf")
    require(positive, "noise_multiplier", noise, "a finite number > 0", "noise_multiplier=1.0")


def _require_sampling(sampling: str, rate: float) -> None:
    require(is_number(rate, at_least=0) and 0 < rate <= 1, "rate", rate, "a share in (0, 1]", "rate=0.01")
    known = sampling in SAMPLINGS
    require(known, "sampling", sampling, f"one of {', '.join(SAMPLINGS)}", "sampling=poisson")
    whole = sampling != "none" or rate == 1
    require(whole, "rate", rate, "1, because sampling=none amplifies nothing", "rate=1.0, or sampling=poisson")


class Epsilon(NamedTuple):
    """Hold upper bounds on epsilon at one delta.

    Attributes:
        pld: from privacy loss distributions; None for events without one.
        rdp: from Renyi divergences.
    """

    pld: float | None
    rdp: float

    @property
    def value(self) -> float:
        """Return the smaller bound, which is the one to quote."""
        return self.rdp if self.pld is None else min(self.pld, self.rdp)


@dataclass(frozen=True)
class Ledger:
    """Record all events that a run has paid for. Charging returns a new ledger; the old one does not change.

    Attributes:
        federation: events that touched whoever took part, e.g. a noisy mean of clients.
        groups: histories of clients that pay for themselves, each once.
        clients: client -> number of its history in ``groups``; absent: nothing spent. A million clients share a few
            histories.
    """

    federation: EventHistory = ()
    groups: tuple[EventHistory, ...] = ()
    clients: Mapping[int, int] = field(default_factory=dict)

    def charge_federation(self, event: AnyEvent, count: int = 1) -> Ledger:
        """With ``count`` more releases of ``event`` by the federation."""
        return Ledger(_plus(self.federation, event, count), self.groups, self.clients)

    def replace_federation(self, event: AnyEvent) -> Ledger:
        """With ``event`` in place of all that the federation has spent: for releases that make up one event."""
        return Ledger(((event, 1),), self.groups, self.clients)

    def charge_clients(self, charges: Mapping[int, tuple[AnyEvent, int]]) -> Ledger:
        """With each client's own ``(event, count)`` added to its history; costs O(clients charged) computations."""
        groups, clients = list(self.groups), dict(self.clients)
        numbers = {history: number for number, history in enumerate(groups)}
        moves: dict[tuple[int, AnyEvent, int], int] = {}
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
        """Return plain JSON values; `from_json` returns an equal ledger."""
        members: dict[int, list[int]] = {}
        for client, number in self.clients.items():
            members.setdefault(number, []).append(int(client))
        groups = [{"spent": _rows(self.groups[number]), "clients": sorted(of)} for number, of in members.items()]
        return {"federation": _rows(self.federation), "groups": groups}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Ledger:
        """Return the ledger that `to_json` wrote.

        Raises:
            LedgerError: the values are damaged, of an unknown type of event, or in another format. A cost is never
                dropped: a damaged ledger must not look cheaper.
        """
        if not isinstance(values, Mapping) or set(values) != {"federation", "groups"}:
            raise LedgerError("a ledger has the keys federation and groups")
        groups = tuple(_history(group["spent"]) for group in values["groups"])
        members = [(int(client), number) for number, g in enumerate(values["groups"]) for client in g["clients"]]
        clients = dict(members)
        if len(clients) != len(members):
            raise LedgerError("a client is in two groups of the ledger")
        return cls(_history(values["federation"]), groups, clients)


def _plus(history: EventHistory, event: AnyEvent, count: int) -> EventHistory:
    counts = dict(history)
    counts[event] = counts.get(event, 0) + int(count)
    return event_history(counts)


def _rows(history: EventHistory) -> list[dict[str, Any]]:
    return [{"type": TYPE_NAMES[type(event)], **asdict(event), "count": count} for event, count in history]


def _history(rows: Any) -> EventHistory:
    counts: dict[AnyEvent, int] = {}
    for row in rows:
        event, count = _read_row(row)
        counts[event] = counts.get(event, 0) + count
    return event_history(counts)


def _read_row(row: Any) -> tuple[AnyEvent, int]:
    if not isinstance(row, Mapping):
        raise LedgerError(f"the ledger has the row {row!r}: rows of this older format are not read")
    kind: Any = EVENT_TYPES.get(str(row.get("type")))
    if kind is None:
        raise LedgerError(f"the ledger has an event of the unknown type {row.get('type')!r}")
    names = {each.name for each in fields(kind)}
    if set(row) != {"type", "count", *names} or not is_count(row["count"]):
        raise LedgerError(f"the ledger has the damaged row {dict(row)!r}")
    values: dict[str, Any] = {name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in names}
    return kind(**values), row["count"]
