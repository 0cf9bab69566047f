"""The asynchronous half of a step: who is sent the newest model when, and whose updates make the step.

Shapes: K updates in a buffer, D parameters laid flat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate, accumulate, add_rows, divide_total
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Array, ClientId, Failure, InFlight, Request, Updates
from fedlearn.loop.protocols import AsyncEngine


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """What made a step.

    Attributes:
        completed: orders that ended, by client and then by age, with what they brought.
        in_flight: orders that are still under way.
        clock: when the last one landed.
        num_sent: orders that were sent out meanwhile.
    """

    completed: tuple[tuple[InFlight, Updates | Failure], ...]
    in_flight: tuple[InFlight, ...]
    clock: float
    num_sent: int

    @property
    def cohort(self) -> tuple[ClientId, ...]:
        """Who answered or was given up, ascending; one that did so twice is there twice."""
        return tuple(one.client for one, _ in self.completed)

    def received_updates(self) -> list[tuple[InFlight, Updates]]:
        """Orders that brought an update."""
        return [(one, result) for one, result in self.completed if isinstance(result, Updates)]

    def staleness(self, round: int) -> np.ndarray:
        """Server steps since each client that delivered was sent its model (K)."""
        return np.array([round - one.request.round for one, _ in self.received_updates()], np.int64)

    def mean_sent_params(self) -> Array:
        """The mean of the models that those clients were sent (D)."""
        orders = {one.request.round: one.request for one, _ in self.received_updates()}
        counts = Counter(one.request.round for one, _ in self.received_updates())
        total = None
        for round, order in orders.items():
            total = add_rows(total, order.params_D[None], np.array([counts[round]]))
        return divide_total(total, counts.total())


def fill_buffer(
    strategy: Strategy,
    engine: AsyncEngine,
    clients: Sequence[ClientId],
    in_flight: Sequence[InFlight],
    request: Request,
) -> Buffer:
    """Keep clients at work until the buffer is full, or nobody is left to ask.

    Args:
        strategy: an asynchronous one.
        engine: which lets orders land.
        clients: all there are.
        in_flight: orders under way.
        request: with the newest model, and the time when the last step was taken.

    *Guarantees*: all that is drawn follows from the order's seed and round.

    Raises:
        SettingError: the buffer is larger than the population.
    """
    rule = strategy.asynchrony
    assert rule is not None
    rule.validate(len(clients))
    up, clock, sent, delivered = list(in_flight), request.clock, 0, 0
    landed: list[tuple[InFlight, Updates | Failure]] = []
    idle = _in_random_order(clients, generator(request.seed, Purpose.SELECT, round=request.round))
    back: list[ClientId] = []  # from earlier orders, and free for this one
    while delivered < rule.buffer_size:
        at_work = {one.client for one in up}
        while len(up) < rule.concurrency and (client := _next(idle, back, at_work)) is not None:
            up.append(InFlight(client=client, request=replace(request, clock=clock)))
            at_work.add(client)
            sent += 1
        if not up:
            break
        place, result, clock = engine.wait_for_next(strategy, up, clock)
        one = up.pop(place)
        landed.append((one, result))
        delivered += isinstance(result, Updates)
        if one.request.round < request.round:
            back.append(one.client)
    landed.sort(key=lambda pair: (pair[0].client, pair[0].request.round))
    return Buffer(completed=tuple(landed), in_flight=tuple(up), clock=clock, num_sent=sent)


def accumulate_buffer(partial: PartialAggregate, strategy: Strategy, buffer: Buffer, round: int) -> PartialAggregate:
    """Fold a buffer, each update multiplied by what its staleness makes it worth."""
    assert strategy.asynchrony is not None
    weights = iter(strategy.asynchrony.staleness_weight(buffer.staleness(round)).tolist())
    for _, result in buffer.completed:
        if isinstance(result, Updates):
            result = replace(result, delta_KD=next(weights) * result.delta_KD)
        partial = accumulate(partial, strategy.aggregate, result)
    return partial


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
