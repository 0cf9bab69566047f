"""Any engine on a virtual clock: who comes late or not at all follows from a model of the clients (`fedlearn.system`).

Shapes: K clients in a block.

No strategy knows of it. What happens has the same words and the same consequences as with real clients (`grid.py`):
``node`` for whoever is not there, drops out or misses the deadline, ``spare`` for whoever was not waited for; and only
those whose answer is taken train, so that the others' memories stay as the server knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedlearn.aggregate import Gathered
from fedlearn.client import sent_as_update
from fedlearn.compress import typical_bytes
from fedlearn.engines.ahead import Ahead, Name, name_of
from fedlearn.engines.base import Engine, Lander, Landing, Mixer, refuse_early_end
from fedlearn.layout import Layout
from fedlearn.records import Array, ClientId, Failure, Flying, Memory, Order, Predictions, Tally, Updates
from fedlearn.strategy import Strategy, sent_beside
from fedlearn.system import Fate, Load, System


class ClockedEngine:
    """Runs another engine's clients on a virtual clock.

    Args:
        engine: which trains.
        system: the model.
        size_of: training examples of a client, from which the steps that it takes follow.

    Attributes:
        lasted: virtual seconds of the last `fit`.
    """

    def __init__(self, engine: Engine, system: System, size_of: Callable[[ClientId], int] = lambda client: 1) -> None:
        self.engine, self.system, self.lasted = engine, system, 0.0
        self.clients, self.layout, self.deployed = engine.clients, engine.layout, engine.deployed
        self._size_of = size_of
        self._strategy: Strategy | None = None
        self._fates: dict[Name, Fate] = {}
        self._ahead = Ahead(engine)

    @property
    def memories(self) -> dict[ClientId, Memory]:
        """What the engine's clients keep."""
        return self.engine.memories

    @memories.setter
    def memories(self, memories: dict[ClientId, Memory]) -> None:
        self.engine.memories = memories

    def fit(
        self, order: Order, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | Gathered | Failure]:
        """Train those whose answer comes in time, in ascending order, after the failures of the others.

        Raises:
            SettingError: a round that closes early would break the sampling law of a privacy claim.
        """
        refuse_early_end(strategy, self.system.enough, "system.enough")
        load = self._load_of(order, strategy)
        fates = {client: self._fate(order, client, load) for client in sorted(cohort)}
        arriving = sorted((fate.seconds, client) for client, fate in fates.items() if not fate.lost)
        wanted, delivered, closed = self.system.enough or len(arriving), 0, 0.0
        yield from (_missing(client, fate.lost) for client, fate in fates.items() if fate.lost)
        while arriving and delivered < wanted:
            now, arriving = arriving[: wanted - delivered], arriving[wanted - delivered :]
            closed, delivered = now[-1][0], delivered + len(now)
            for result in self.engine.fit(order, strategy, sorted(client for _, client in now)):
                delivered -= isinstance(result, Failure)  # one of those who are still to come takes its place
                yield result
        self.clients = self.engine.clients
        if delivered < wanted or self.system.enough is None:
            closed = max((fate.seconds for fate in fates.values()), default=0.0)
        self.lasted = closed
        why = f"the round had its {wanted} updates without it"
        yield from (Failure(client=client, stage="spare", reason=why) for _, client in arriving)

    def land(self, strategy: Strategy, flying: Sequence[Flying], clock: float) -> Landing:
        """The next of these clients finishes. It trains no earlier than it must, with others that will (`Ahead`)."""
        known = self._fates if strategy is self._strategy else {}
        self._strategy, names = strategy, [name_of(one) for one in flying]
        self._fates = {
            name: known.get(name) or self._fate(one.order, one.client, self._load_of(one.order, strategy))
            for name, one in zip(names, flying, strict=True)
        }
        fates = [self._fates[name] for name in names]
        done = [one.order.clock + fate.seconds for one, fate in zip(flying, fates, strict=True)]
        by_time = sorted(range(len(flying)), key=lambda i: (done[i], flying[i].client))
        first, lost = by_time[0], fates[by_time[0]].lost
        if lost:
            result: Updates | Failure = _missing(flying[first].client, lost)
        elif isinstance(self.engine, Lander):  # real clients train when they are told to
            result = self.engine.land(strategy, [flying[first]], flying[first].order.clock).result
        else:
            result = self._ahead.bring(strategy, [flying[i] for i in by_time if not fates[i].lost])
        return Landing(first, result, max(clock, done[first]))

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], own: Strategy | None = None
    ) -> Iterator[Predictions | Tally | Failure]:
        """As the engine does; it takes no virtual time."""
        return self.engine.evaluate(params_D, cohort, own) if own else self.engine.evaluate(params_D, cohort)

    @property
    def mixed_size(self) -> int:
        """Clients of an asynchronous strategy that the engine trains at a time, at most."""
        return self.engine.mixed_size if isinstance(self.engine, Mixer) else 1

    def describe(self, cohort_size: int) -> str:
        """As the engine does."""
        return self.engine.describe(cohort_size)

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def _load_of(self, order: Order, strategy: Strategy) -> Callable[[ClientId], Load]:
        """What this order costs each client."""
        if self.system.device is None:
            return lambda client: Load()
        vectors = 4 * self.layout.num_parameters
        down = vectors + sum(4 * int(np.prod(v.shape)) for v in order.broadcast.values())
        up = _update_bytes(strategy, order, self.layout) + vectors * len(sent_beside(strategy.local))
        return lambda client: Load(order.local.steps_of(self._size_of(client)), down, up)

    def _fate(self, order: Order, client: ClientId, load_of: Callable[[ClientId], Load]) -> Fate:
        return self.system.fate(order.seed, client, order.round, load_of(client), clock=order.clock)


def _missing(client: ClientId, why: str) -> Failure:
    return Failure(client=client, stage="node", reason=why)


def _update_bytes(strategy: Strategy, order: Order, layout: Layout) -> int:
    """Of a client's update on its way up."""
    if strategy.codec is not None:
        return typical_bytes(strategy.codec, strategy.leaving(layout))
    numbers, dtype = sent_as_update(strategy, order, layout)
    return numbers * dtype.itemsize
