"""Clients under way on a virtual clock train in blocks, and land one at a time.

What a client does follows from its order and from its own memory, which nothing changes while it is at work. So it may
train at any time before it lands; and it does with others that are under way when the first of them lands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.records import ClientId, Failure, InFlight, LocalSettings, State, Updates
from fedlearn.loop.protocols import Engine, MixedRoundEngine

RequestKey = tuple[int, ClientId, int, float, int, LocalSettings]


class DeferredTraining:
    """Trains clients before they land. Until then nothing of it is seen: neither updates nor what they remember.

    Args:
        engine: which trains.

    *Guarantees*: results wait of clients that are under way only, so of no more than the strategy's concurrency.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._strategy: Strategy | None = None
        self._waiting: dict[RequestKey, tuple[InFlight, Updates | Failure, State | None]] = {}

    def next_result(self, strategy: Strategy, due: Sequence[InFlight]) -> Updates | Failure:
        """What the first of these brings, who land in this order; results of whoever is not among them are dropped."""
        known = {request_key(one) for one in due} if strategy is self._strategy else set()
        self._strategy = strategy
        self._waiting = {name: kept for name, kept in self._waiting.items() if name in known}
        name = request_key(due[0])
        if name not in self._waiting:
            self._train(strategy, [one for one in due if request_key(one) not in self._waiting])
        _, result, memory = self._waiting.pop(name)
        if memory is not None:
            self.engine.client_states[due[0].client] = memory
        return result

    def _train(self, strategy: Strategy, untrained: Sequence[InFlight]) -> None:
        """Train the first and others: all of one version, or of any where engine and rule can do that."""
        engine, order = self.engine, untrained[0].request
        most = engine.mixed_block_size if isinstance(engine, MixedRoundEngine) else len(untrained)
        if isinstance(engine, MixedRoundEngine) and strategy.local.supports_mixed_rounds:
            block = untrained[:most]
            found: Iterable[Any] = engine.fit_mixed_rounds(strategy, block)
        else:
            block = [one for one in untrained if one.request.round == order.round][:most]
            found = engine.fit(order, strategy, sorted(one.client for one in block))
        before = {one.client: engine.client_states[one.client] for one in block if one.client in engine.client_states}
        results = _by_client(found)
        for one in block:
            self._waiting[request_key(one)] = (one, results[one.client], engine.client_states.pop(one.client, None))
        engine.client_states.update(before)


def request_key(in_flight: InFlight) -> RequestKey:
    """Of an order; its model is kept with the result, so that no other one takes its place in memory."""
    order = in_flight.request
    return order.seed, in_flight.client, order.round, order.clock, id(order.params_D), order.local


def _by_client(found: Iterable[Updates | PartialAggregate | Failure]) -> dict[ClientId, Updates | Failure]:
    results: dict[ClientId, Updates | Failure] = {}
    for one in found:
        assert not isinstance(one, PartialAggregate), "what an asynchronous strategy aggregates cannot be merged"
        if isinstance(one, Failure):
            results[one.client] = one
        else:
            results |= {client: one.rows(np.array([k])) for k, client in enumerate(one.clients_K.tolist())}
    return results
