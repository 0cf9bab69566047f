"""Clients under way on a virtual clock train in blocks, and land one at a time.

What a client does follows from its order and from its own memory, which nothing changes while it is at work. So it may
train at any time before it lands; and it does with others that are under way when the first of them lands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedlearn.aggregate import Gathered
from fedlearn.engines.base import Engine, Mixer
from fedlearn.records import ClientId, Failure, Flying, LocalSettings, Memory, Updates
from fedlearn.strategy import Strategy
from fedlearn.training import mixes

Name = tuple[int, ClientId, int, float, int, LocalSettings]


class Ahead:
    """Trains clients before they land. Until then nothing of it is seen: neither updates nor what they remember.

    Args:
        engine: which trains.

    *Guarantees*: results wait of clients that are under way only, so of no more than the strategy's concurrency.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._strategy: Strategy | None = None
        self._waiting: dict[Name, tuple[Flying, Updates | Failure, Memory | None]] = {}

    def bring(self, strategy: Strategy, due: Sequence[Flying]) -> Updates | Failure:
        """What the first of these brings, who land in this order; results of whoever is not among them are dropped."""
        known = {name_of(one) for one in due} if strategy is self._strategy else set()
        self._strategy = strategy
        self._waiting = {name: kept for name, kept in self._waiting.items() if name in known}
        name = name_of(due[0])
        if name not in self._waiting:
            self._train(strategy, [one for one in due if name_of(one) not in self._waiting])
        _, result, memory = self._waiting.pop(name)
        if memory is not None:
            self.engine.memories[due[0].client] = memory
        return result

    def _train(self, strategy: Strategy, untrained: Sequence[Flying]) -> None:
        """Train the first and others: all of one version, or of any where engine and rule can do that."""
        engine, order = self.engine, untrained[0].order
        most = engine.mixed_size if isinstance(engine, Mixer) else len(untrained)
        if isinstance(engine, Mixer) and mixes(strategy.local):
            block = untrained[:most]
            found: Iterable[Any] = engine.fit_mixed(strategy, block)
        else:
            block = [one for one in untrained if one.order.round == order.round][:most]
            found = engine.fit(order, strategy, sorted(one.client for one in block))
        before = {one.client: engine.memories[one.client] for one in block if one.client in engine.memories}
        results = _by_client(found)
        for one in block:
            self._waiting[name_of(one)] = (one, results[one.client], engine.memories.pop(one.client, None))
        engine.memories.update(before)


def name_of(one: Flying) -> Name:
    """Of an order; its model is kept with the result, so that no other one takes its place in memory."""
    order = one.order
    return order.seed, one.client, order.round, order.clock, id(order.params_D), order.local


def _by_client(found: Iterable[Updates | Gathered | Failure]) -> dict[ClientId, Updates | Failure]:
    results: dict[ClientId, Updates | Failure] = {}
    for one in found:
        assert not isinstance(one, Gathered), "what an asynchronous strategy aggregates cannot be merged"
        if isinstance(one, Failure):
            results[one.client] = one
        else:
            results |= {client: one.rows(np.array([k])) for k, client in enumerate(one.clients_K.tolist())}
    return results
