"""Collect the updates of one asynchronous step: send the newest model to idle clients, and wait for completions.

Shapes: K updates in a buffer, D parameters.
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
    """Hold the results of one asynchronous step.

    Attributes:
        completed: completed requests with their results, in order of client id and then of round.
        in_flight: requests that are still in flight.
        clock: time of the last completion, in seconds since the run began.
        num_sent: number of requests that the server sent during the step.
    """

    completed: tuple[tuple[InFlight, Updates | Failure], ...]
    in_flight: tuple[InFlight, ...]
    clock: float
    num_sent: int

    @property
    def cohort(self) -> tuple[ClientId, ...]:
        """Clients of the completed requests, ascending. A client with two completed requests occurs twice."""
        return tuple(item.client for item, _ in self.completed)

    def received_updates(self) -> list[tuple[InFlight, Updates]]:
        """Return the completed requests that gave an update, with their updates."""
        return [(item, result) for item, result in self.completed if isinstance(result, Updates)]

    def staleness(self, round: int) -> np.ndarray:
        """Return the number of server steps between the request and this round, for each update, ``(K,)``."""
        return np.array([round - item.request.round for item, _ in self.received_updates()], np.int64)

    def mean_sent_params(self) -> Array:
        """Return the mean of the models from which the received updates started, ``(D,)``."""
        requests = {item.request.round: item.request for item, _ in self.received_updates()}
        counts = Counter(item.request.round for item, _ in self.received_updates())
        total = None
        for round, request in requests.items():
            total = add_rows(total, request.params_D[None], np.array([counts[round]]))
        return divide_total(total, counts.total())


def fill_buffer(
    strategy: Strategy,
    engine: AsyncEngine,
    clients: Sequence[ClientId],
    in_flight: Sequence[InFlight],
    request: Request,
) -> Buffer:
    """Send requests and wait for completions until the buffer is full, or no request is in flight.

    Args:
        strategy: the asynchronous strategy.
        engine: engine that completes requests.
        clients: ids of all clients.
        in_flight: requests in flight at the start.
        request: the request with the newest model, and with the time of the last step.

    *Guarantees*: all draws depend only on the seed and the round of the request. No client receives a model twice.

    Raises:
        SettingError: The buffer is larger than the population.
    """
    rule = strategy.asynchrony
    assert rule is not None
    rule.validate(len(clients))
    pending, clock, num_sent, num_updates = list(in_flight), request.clock, 0, 0
    completed: list[tuple[InFlight, Updates | Failure]] = []
    candidates = _in_random_order(clients, generator(request.seed, Purpose.SELECT, round=request.round))
    returned: list[ClientId] = []  # clients that completed an older request and have not received this model
    while num_updates < rule.buffer_size:
        busy = {item.client for item in pending}
        while len(pending) < rule.concurrency and (client := _next_client(candidates, returned, busy)) is not None:
            pending.append(InFlight(client=client, request=replace(request, clock=clock)))
            busy.add(client)
            num_sent += 1
        if not pending:
            break
        index, result, clock = engine.wait_for_next(strategy, pending, clock)
        item = pending.pop(index)
        completed.append((item, result))
        num_updates += isinstance(result, Updates)
        if item.request.round < request.round:
            returned.append(item.client)
    completed.sort(key=lambda pair: (pair[0].client, pair[0].request.round))
    return Buffer(completed=tuple(completed), in_flight=tuple(pending), clock=clock, num_sent=num_sent)


def accumulate_buffer(partial: PartialAggregate, strategy: Strategy, buffer: Buffer, round: int) -> PartialAggregate:
    """Add the results of a buffer to a partial aggregate, with each update times the weight of its staleness."""
    assert strategy.asynchrony is not None
    weights = iter(strategy.asynchrony.staleness_weight(buffer.staleness(round)).tolist())
    for _, result in buffer.completed:
        if isinstance(result, Updates):
            result = replace(result, delta_KD=next(weights) * result.delta_KD)
        partial = accumulate(partial, strategy.aggregate, result)
    return partial


def _next_client(candidates: Iterator[ClientId], returned: list[ClientId], busy: set[ClientId]) -> ClientId | None:
    """Return a client that is not busy and has not received this model; None if there is none."""
    for client in candidates:
        if client not in busy:
            if client in returned:
                returned.remove(client)
            return client
    return returned.pop(0) if returned else None


def _in_random_order(clients: Sequence[ClientId], rng: np.random.Generator) -> Iterator[ClientId]:
    """Yield all clients in random order.

    The cost is proportional to the number of clients that the caller takes, not to the population.
    """
    drawn: set[int] = set()
    while 2 * len(drawn) < len(clients):
        index = int(rng.integers(len(clients)))
        if index not in drawn:
            drawn.add(index)
            yield int(clients[index])
    rest = [index for index in range(len(clients)) if index not in drawn]
    yield from (int(clients[index]) for index in rng.permutation(rest).tolist())
