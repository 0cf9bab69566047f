"""Privacy ledger: the releases of a run as data, for the federation and for each client.

`fedlearn.privacy.accounting` computes epsilon; this module does not. So programs read, save and update a ledger without
an accounting library.
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
WHOLE_ORDERS = (*map(float, range(2, 65)), 128.0, 256.0, 512.0, 1024.0)  # orders of Renyi divergences
FRACTIONAL_ORDERS = (*(1 + tenths / 10 for tenths in range(1, 91)), *WHOLE_ORDERS[9:])  # for bounds at all orders


class LedgerError(FedlearnError, ValueError):
    """A saved ledger is damaged or has another format."""


@dataclass(frozen=True, slots=True, order=True)
class Event:
    """One release of a sum with Gaussian noise.

    Args:
        noise_multiplier: standard deviation of the noise divided by the L2 sensitivity of the sum, > 0. The
            adjacency of the mechanism determines the sensitivity. It is ``clip`` if a record is added or removed, and
            ``2 clip`` if it is replaced. So an event has one meaning for all accountants.
        sampling: sampling law of the records in the sum. ``poisson`` draws each record independently with probability
            ``rate``. ``fixed_size`` draws this share of the records without replacement; its adjacency is replacement.
            ``none`` makes no assumption.
        rate: sampling rate, in (0, 1]; 1 for ``none``.

    Raises:
        SettingError: A number is out of range or NaN.
    """

    noise_multiplier: float
    sampling: Sampling = "none"
    rate: float = 1.0

    def __post_init__(self) -> None:
        _require_noise(self.noise_multiplier)
        _require_sampling(self.sampling, self.rate)


@dataclass(frozen=True, slots=True, order=True)
class LaplaceEvent:
    """One release of a sum with Laplace noise.

    Args:
        noise_multiplier: scale b of the noise (density ``exp(-|x| / b) / 2b`` in each coordinate) divided by the L1
            sensitivity of the sum, > 0. One release without sampling has epsilon ``1 / noise_multiplier`` and delta 0.
        sampling: see `Event`.
        rate: see `Event`.

    Raises:
        SettingError: A number is out of range or NaN.

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
    """One release of a mechanism that is only known to be (epsilon, delta)-differentially private.

    Args:
        epsilon: epsilon of the mechanism, > 0 and finite.
        delta: delta of the mechanism, in [0, 1); 0 for pure differential privacy.

    Raises:
        SettingError: A number is out of range or NaN.
    """

    epsilon: float
    delta: float = 0.0

    def __post_init__(self) -> None:
        positive = is_number(self.epsilon, at_least=0) and 0 < self.epsilon < float("inf")
        require(positive, "epsilon", self.epsilon, "a finite number > 0", "epsilon=1.0")
        require(is_number(self.delta, at_least=0, below=1), "delta", self.delta, "a number in [0, 1)", "delta=0")


@dataclass(frozen=True, slots=True, order=True)
class RenyiEvent:
    """One release of a mechanism with known bounds on its Renyi divergences.

    Args:
        orders: orders, ascending, each > 1. The bound of an order also holds for smaller orders, because divergences
            increase with the order. Above the largest order there is no bound.
        divergences: upper bounds on the divergence of each order, in both directions, >= 0.

    Raises:
        SettingError: A number is out of range or NaN, or the lengths differ.

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
EVENT_TYPES: Mapping[str, type[AnyEvent]] = {  # names in JSON; histories are sorted in this order of types
    "gaussian": Event,
    "laplace": LaplaceEvent,
    "epsilon_delta": EpsilonDeltaEvent,
    "renyi": RenyiEvent,
}
TYPE_NAMES = {kind: name for name, kind in EVENT_TYPES.items()}
EventHistory = tuple[tuple[AnyEvent, int], ...]  # count of each event, in ascending order of events


def event_history(counts: Mapping[Any, int]) -> EventHistory:
    """Return counts of events as a sorted history, so that equal counts give equal histories."""
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
    fits = sampling != "none" or rate == 1
    require(fits, "rate", rate, "1, because sampling=none gives no amplification", "rate=1.0")


class Epsilon(NamedTuple):
    """Upper bounds on epsilon at one delta.

    Attributes:
        pld: bound from privacy loss distributions; None if an event has no loss distribution.
        rdp: bound from Renyi divergences.
    """

    pld: float | None
    rdp: float

    @property
    def value(self) -> float:
        """The smaller of both bounds, for reports."""
        return self.rdp if self.pld is None else min(self.pld, self.rdp)


@dataclass(frozen=True)
class Ledger:
    """Record of all releases of a run. A charge returns a new ledger and does not change the old one.

    Attributes:
        federation: events that all participating clients pay for, e.g. a noisy mean of clients.
        groups: distinct histories of clients that pay for their own rounds.
        clients: client -> index of its history in ``groups``; clients without events are absent. A million clients
            share a few histories.
    """

    federation: EventHistory = ()
    groups: tuple[EventHistory, ...] = ()
    clients: Mapping[int, int] = field(default_factory=dict)

    def charge_federation(self, event: AnyEvent, count: int = 1) -> Ledger:
        """Return the ledger after ``count`` more releases of ``event`` by the federation."""
        return Ledger(_plus(self.federation, event, count), self.groups, self.clients)

    def replace_federation(self, event: AnyEvent) -> Ledger:
        """Return the ledger with ``event`` instead of all events of the federation.

        It is for mechanisms whose releases of all rounds together are one event.
        """
        return Ledger(((event, 1),), self.groups, self.clients)

    def charge_clients(self, charges: Mapping[int, tuple[AnyEvent, int]]) -> Ledger:
        """Return the ledger after the clients' events. The cost is linear in the number of charged clients.

        Args:
            charges: client -> event and its count.
        """
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
        """Return the ledger without the histories that no client has any more."""
        used = sorted(set(self.clients.values()))
        number = {old: new for new, old in enumerate(used)}
        clients = {client: number[old] for client, old in self.clients.items()}
        return Ledger(self.federation, tuple(self.groups[old] for old in used), clients)

    @cached_property
    def histories(self) -> tuple[EventHistory, ...]:
        """Distinct histories of the clients."""
        return tuple(self.groups[number] for number in sorted(set(self.clients.values())))

    def client_history(self, client: int) -> EventHistory:
        """Return the history of one client; empty for a client without events."""
        return self.groups[self.clients[client]] if client in self.clients else ()

    def to_json(self) -> dict[str, Any]:
        """Return the ledger as JSON values; `from_json` returns an equal ledger."""
        members: dict[int, list[int]] = {}
        for client, number in self.clients.items():
            members.setdefault(number, []).append(int(client))
        groups = [{"spent": _rows(self.groups[number]), "clients": sorted(ids)} for number, ids in members.items()]
        return {"federation": _rows(self.federation), "groups": groups}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Ledger:
        """Return the ledger that `to_json` wrote.

        Raises:
            LedgerError: The values are damaged, have an unknown type of event, or have another format. No cost is
                ignored, because a damaged ledger must not appear cheaper.
        """
        if not isinstance(values, Mapping) or set(values) != {"federation", "groups"}:
            raise LedgerError("the ledger has other keys, expected federation and groups")
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
        raise LedgerError(f"the ledger has the row {row!r}, expected a mapping; this older format is not supported")
    kind: Any = EVENT_TYPES.get(str(row.get("type")))
    if kind is None:
        raise LedgerError(f"the ledger has an event of the unknown type {row.get('type')!r}")
    names = {each.name for each in fields(kind)}
    if set(row) != {"type", "count", *names} or not is_count(row["count"]):
        raise LedgerError(f"the ledger has the damaged row {dict(row)!r}")
    values: dict[str, Any] = {name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in names}
    return kind(**values), row["count"]
