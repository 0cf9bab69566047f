"""Clients under way on a virtual clock train in blocks, and land one at a time.

What a client does follows from its order and from its own memory, which nothing changes while it is at work. So it may
train at any time before it lands; and it does with others that are under way when the first of them lands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fedlearn.aggregate import Gathered
from fedlearn.engines.base import Engine, Mixer
from fedlearn.records import ClientId, Failure, Flying, LocalSettings, Memory, Updates
from fedlearn.strategy import Strategy
from fedlearn.training import mixes

Name = tuple[ClientId, int, float, int, LocalSettings]


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
        known = {_name(one) for one in due} if strategy is self._strategy else set()
        self._strategy = strategy
        self._waiting = {name: kept for name, kept in self._waiting.items() if name in known}
        name = _name(due[0])
        if name not in self._waiting:
            self._train(strategy, [one for one in due if _name(one) not in self._waiting])
        _, result, memory = self._waiting.pop(name)
        if memory is not None:
            self.engine.memories[due[0].client] = memory
        return result

    def _train(self, strategy: Strategy, untrained: Sequence[Flying]) -> None:
        mixer = self.engine if isinstance(self.engine, Mixer) and mixes(strategy.local) else None
        if mixer is None:
            order = untrained[0].order
            block: Sequence[Flying] = [one for one in untrained if one.order.round == order.round]
            found = self.engine.fit(order, strategy, [one.client for one in block])
        else:
            block = untrained[: _power_of_two(min(len(untrained), mixer.mixed_size))]
            found = mixer.fit_mixed(strategy, block)
        before = dict(self.engine.memories)
        results = _by_client(found)
        after = self.engine.memories
        for one in block:
            self._waiting[_name(one)] = (one, results[one.client], after.pop(one.client, None))
        after.update(before)


def _name(one: Flying) -> Name:
    """Of an order; its model is kept with the result, so that no other one takes its place in memory."""
    return one.client, one.order.round, one.order.clock, id(one.order.params_D), one.order.local


def _power_of_two(most: int) -> int:
    """The largest that is not larger: blocks of few sizes, so that few programs are compiled."""
    return 1 << (most.bit_length() - 1)


def _by_client(found: Iterable[Updates | Gathered | Failure]) -> dict[ClientId, Updates | Failure]:
    results: dict[ClientId, Updates | Failure] = {}
    for one in found:
        assert not isinstance(one, Gathered), "what an asynchronous strategy aggregates cannot be merged"
        if isinstance(one, Failure):
            results[one.client] = one
        else:
            results |= {client: one.rows(np.array([k])) for k, client in enumerate(one.clients_K.tolist())}
    return results
