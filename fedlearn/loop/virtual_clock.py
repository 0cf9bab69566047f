"""A virtual clock around any engine: stragglers and dropouts follow from the system model.

Shapes: K clients in a block.

No strategy knows of it. What happens has the same words and the same consequences as with real clients (`grid.py`):
``node`` for whoever is not there, drops out or misses the deadline, ``spare`` for whoever was not waited for; and only
those whose answer is taken train, so that the others' memories stay as the server knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.strategy import Strategy, extra_names
from fedlearn.algorithm.transforms import estimate_bytes
from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientId, Failure, FailureStage, InFlight, Request, Updates
from fedlearn.loop.client_update import update_size_and_dtype
from fedlearn.loop.deferred_training import DeferredTraining, RequestKey, request_key
from fedlearn.loop.protocols import AsyncEngine, Completion, Engine
from fedlearn.loop.system_model import Arrival, SystemModel, Workload, refuse_early_end
from fedlearn.loop.wrappers import EngineWrapper


class VirtualClockEngine(EngineWrapper):
    """Run the clients of another engine on a virtual clock.

    Args:
        engine: which trains.
        system: the model.
        num_examples_of: training examples of a client, from which the steps that it takes follow.
    """

    def __init__(
        self, engine: Engine, system: SystemModel, num_examples_of: Callable[[ClientId], int] = lambda client: 1
    ) -> None:
        super().__init__(engine)
        self.system, self._elapsed_s = system, 0.0
        self._size_of = num_examples_of
        self._strategy: Strategy | None = None
        self._fates: dict[RequestKey, Arrival] = {}
        self._ahead = DeferredTraining(engine)

    @property
    def elapsed_s(self) -> float:
        """Virtual seconds of the last `fit`."""
        return self._elapsed_s

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Train those whose answer comes in time, in ascending order, after the failures of the others.

        Raises:
            SettingError: a round that closes early would break the sampling law of a privacy claim.
        """
        refuse_early_end(strategy, self.system.min_completed, "system.min_completed")
        load = self._load_of(request, strategy)
        fates = {client: self._fate(request, client, load) for client in sorted(cohort)}
        arriving = sorted((fate.seconds, client) for client, fate in fates.items() if not fate.failure_reason)
        wanted, delivered, closed = self.system.min_completed or len(arriving), 0, 0.0
        yield from (_missing(client, fate.failure_reason) for client, fate in fates.items() if fate.failure_reason)
        while arriving and delivered < wanted:
            now, arriving = arriving[: wanted - delivered], arriving[wanted - delivered :]
            closed, delivered = now[-1][0], delivered + len(now)
            for result in self.engine.fit(request, strategy, sorted(client for _, client in now)):
                delivered -= isinstance(result, Failure)  # one of those who are still to come takes its place
                yield result
        if delivered < wanted or self.system.min_completed is None:
            closed = max((fate.seconds for fate in fates.values()), default=0.0)
        self._elapsed_s = closed
        why = f"the round had its {wanted} updates without it"
        yield from (Failure(client=client, stage=FailureStage.NOT_NEEDED, reason=why) for _, client in arriving)

    def wait_for_next(self, strategy: Strategy, in_flight: Sequence[InFlight], clock: float) -> Completion:
        """Return the next completion; training is deferred and batched with other clients (`DeferredTraining`)."""
        known = self._fates if strategy is self._strategy else {}
        self._strategy, names = strategy, [request_key(one) for one in in_flight]
        self._fates = {
            name: known.get(name) or self._fate(one.request, one.client, self._load_of(one.request, strategy))
            for name, one in zip(names, in_flight, strict=True)
        }
        fates = [self._fates[name] for name in names]
        done = [one.request.clock + fate.seconds for one, fate in zip(in_flight, fates, strict=True)]
        by_time = sorted(range(len(in_flight)), key=lambda i: (done[i], in_flight[i].client))
        first, lost = by_time[0], fates[by_time[0]].failure_reason
        if lost:
            result: Updates | Failure = _missing(in_flight[first].client, lost)
        elif isinstance(self.engine, AsyncEngine):  # real clients train when they are told to
            result = self.engine.wait_for_next(strategy, [in_flight[first]], in_flight[first].request.clock).result
        else:
            result = self._ahead.next_result(strategy, [in_flight[i] for i in by_time if not fates[i].failure_reason])
        return Completion(first, result, max(clock, done[first]))

    def _load_of(self, order: Request, strategy: Strategy) -> Callable[[ClientId], Workload]:
        """What this order costs each client."""
        if self.system.device is None:
            return lambda client: Workload()
        vectors = 4 * self.layout.num_parameters
        down = vectors + sum(4 * int(np.prod(v.shape)) for v in order.broadcast.values())
        up = _update_bytes(strategy, order, self.layout) + vectors * len(extra_names(strategy.local))
        return lambda client: Workload(order.local.num_steps(self._size_of(client)), down, up)

    def _fate(self, order: Request, client: ClientId, load_of: Callable[[ClientId], Workload]) -> Arrival:
        return self.system.arrival(order.seed, client, order.round, load_of(client), clock=order.clock)


def _missing(client: ClientId, why: str) -> Failure:
    return Failure(client=client, stage=FailureStage.NODE, reason=why)


def _update_bytes(strategy: Strategy, order: Request, layout: Layout) -> int:
    """Of a client's update on its way up."""
    if strategy.codec is not None:
        return estimate_bytes(strategy.codec, strategy.shared_layout(layout))
    numbers, dtype = update_size_and_dtype(strategy, order, layout)
    return numbers * dtype.itemsize
