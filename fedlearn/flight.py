"""The asynchronous half of a step: who is sent the newest model when, and whose updates make the step.

Shapes: K updates in a buffer, D parameters laid flat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlearn.aggregate import Gathered, add_rows, gather, value
from fedlearn.engines.base import Lander
from fedlearn.records import Array, ClientId, Failure, Flying, Order, Updates
from fedlearn.seeds import Purpose, generator
from fedlearn.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """What made a step.

    Attributes:
        landed: orders that ended, by client and then by age, with what they brought.
        flying: orders that are still under way.
        clock: when the last one landed.
        num_sent: orders that were sent out meanwhile.
    """

    landed: tuple[tuple[Flying, Updates | Failure], ...]
    flying: tuple[Flying, ...]
    clock: float
    num_sent: int

    @property
    def cohort(self) -> tuple[ClientId, ...]:
        """Who answered or was given up, ascending; one that did so twice is there twice."""
        return tuple(one.client for one, _ in self.landed)

    def delivered(self) -> list[tuple[Flying, Updates]]:
        """Orders that brought an update."""
        return [(one, result) for one, result in self.landed if isinstance(result, Updates)]

    def staleness(self, round: int) -> np.ndarray:
        """Server steps since each client that delivered was sent its model (K)."""
        return np.array([round - one.order.round for one, _ in self.delivered()], np.int64)

    def sent(self) -> Array:
        """The mean of the models that those clients were sent (D)."""
        orders = {one.order.round: one.order for one, _ in self.delivered()}
        counts = Counter(one.order.round for one, _ in self.delivered())
        total = None
        for round, order in orders.items():
            total = add_rows(total, order.params_D[None], np.array([counts[round]]))
        return value(total, counts.total())


def fill(
    strategy: Strategy, engine: Lander, clients: Sequence[ClientId], flying: Sequence[Flying], order: Order
) -> Buffer:
    """Keep clients at work until the buffer is full, or nobody is left to ask.

    Args:
        strategy: an asynchronous one.
        engine: which lets orders land.
        clients: all there are.
        flying: orders under way.
        order: with the newest model, and the time when the last step was taken.

    *Guarantees*: all that is drawn follows from the order's seed and round.

    Raises:
        SettingError: the buffer is larger than the population.
    """
    rule = strategy.asynchrony
    assert rule is not None
    rule.suit(len(clients))
    up, clock, sent, delivered = list(flying), order.clock, 0, 0
    landed: list[tuple[Flying, Updates | Failure]] = []
    idle = _in_random_order(clients, generator(order.seed, Purpose.SELECT, round=order.round))
    back: list[ClientId] = []  # from earlier orders, and free for this one
    while delivered < rule.buffer_size:
        at_work = {one.client for one in up}
        while len(up) < rule.concurrency and (client := _next(idle, back, at_work)) is not None:
            up.append(Flying(client=client, order=replace(order, clock=clock)))
            at_work.add(client)
            sent += 1
        if not up:
            break
        place, result, clock = engine.land(strategy, up, clock)
        one = up.pop(place)
        landed.append((one, result))
        delivered += isinstance(result, Updates)
        if one.order.round < order.round:
            back.append(one.client)
    landed.sort(key=lambda pair: (pair[0].client, pair[0].order.round))
    return Buffer(landed=tuple(landed), flying=tuple(up), clock=clock, num_sent=sent)


def gather_buffer(gathered: Gathered, strategy: Strategy, buffer: Buffer, round: int) -> Gathered:
    """Fold a buffer, each update multiplied by what its staleness makes it worth."""
    assert strategy.asynchrony is not None
    weights = iter(strategy.asynchrony.weight(buffer.staleness(round)).tolist())
    for _, result in buffer.landed:
        if isinstance(result, Updates):
            result = replace(result, delta_KD=next(weights) * result.delta_KD)
        gathered = gather(gathered, strategy.aggregate, result)
    return gathered


def _next(idle: Iterator[ClientId], back: list[ClientId], at_work: set[ClientId]) -> ClientId | None:
    """A client that is free and was not sent this model yet."""
    for client in idle:
        if client not in at_work:
            if client in back:
                back.remove(client)
            return client
    return back.pop(0) if back else None


def _in_random_order(clients: Sequence[ClientId], rng: np.random.Generator) -> Iterator[ClientId]:
    """All of them, at the cost of those that are asked for: a large population is not listed first."""
    seen: set[int] = set()
    while 2 * len(seen) < len(clients):
        place = int(rng.integers(len(clients)))
        if place not in seen:
            seen.add(place)
            yield int(clients[place])
    rest = [place for place in range(len(clients)) if place not in seen]
    yield from (int(clients[place]) for place in rng.permutation(rest).tolist())
