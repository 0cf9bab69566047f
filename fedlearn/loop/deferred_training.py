"""Train clients with requests in flight in blocks, and return their results one at a time, on a virtual clock.

The update of a client depends on its request and its client state. Neither changes while the request is in flight. So
the client may train at any time before its completion. This module trains it together with other clients in flight,
when the first of them completes.
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
    """Train clients before their completion, and hide updates and client states until then.

    Args:
        engine: engine that trains the clients.

    *Guarantees*: stored results belong to requests in flight only, so their number is at most the concurrency of the
    strategy.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._strategy: Strategy | None = None
        # the values hold the requests, so that no other model can get the id of a model in a key
        self._waiting: dict[RequestKey, tuple[InFlight, Updates | Failure, State | None]] = {}

    def next_result(self, strategy: Strategy, due: Sequence[InFlight]) -> Updates | Failure:
        """Return the result of the first request. Train it first if necessary, with others.

        Args:
            strategy: the asynchronous strategy.
            due: requests in flight in order of their completion. Results of all other requests are dropped.
        """
        known = {request_key(item) for item in due} if strategy is self._strategy else set()
        self._strategy = strategy
        self._waiting = {key: entry for key, entry in self._waiting.items() if key in known}
        key = request_key(due[0])
        if key not in self._waiting:
            self._train(strategy, [item for item in due if request_key(item) not in self._waiting])
        _, result, client_state = self._waiting.pop(key)
        if client_state is not None:
            self.engine.client_states[due[0].client] = client_state
        return result

    def _train(self, strategy: Strategy, untrained: Sequence[InFlight]) -> None:
        """Train the first client and others in one block.

        The requests come from one round, or from several rounds if the engine and the rule support this.
        """
        engine, request = self.engine, untrained[0].request
        max_size = engine.mixed_block_size if isinstance(engine, MixedRoundEngine) else len(untrained)
        if isinstance(engine, MixedRoundEngine) and strategy.local.supports_mixed_rounds:
            block = untrained[:max_size]
            outcomes: Iterable[Any] = engine.fit_mixed_rounds(strategy, block)
        else:
            block = [item for item in untrained if item.request.round == request.round][:max_size]
            outcomes = engine.fit(request, strategy, sorted(item.client for item in block))
        clients = [item.client for item in block]
        old_states = {client: engine.client_states[client] for client in clients if client in engine.client_states}
        results = _by_client(outcomes)
        for item in block:
            new_state = engine.client_states.pop(item.client, None)
            self._waiting[request_key(item)] = (item, results[item.client], new_state)
        engine.client_states.update(old_states)


def request_key(in_flight: InFlight) -> RequestKey:
    """Return the key of a request to one client. The key contains the id of the model, not the model itself."""
    request = in_flight.request
    return request.seed, in_flight.client, request.round, request.clock, id(request.params_D), request.local


def _by_client(outcomes: Iterable[Updates | PartialAggregate | Failure]) -> dict[ClientId, Updates | Failure]:
    results: dict[ClientId, Updates | Failure] = {}
    for outcome in outcomes:
        assert not isinstance(outcome, PartialAggregate), "asynchronous strategies do not merge partial aggregates"
        if isinstance(outcome, Failure):
            results[outcome.client] = outcome
        else:
            results |= {client: outcome.rows(np.array([k])) for k, client in enumerate(outcome.clients_K.tolist())}
    return results
