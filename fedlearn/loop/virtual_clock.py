"""Run any engine on a virtual clock: a system model determines stragglers and dropouts.

Strategies do not see the clock. Failures have the same stages and effects as in a deployment. The stage is ``node`` for
a client that is not connected, drops out or misses the deadline. The stage is ``not_needed`` for a client whose
response comes after the round is closed. Only clients whose response is used train, so the states of other clients do
not change.
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
        engine: engine that trains the clients.
        system: speed and availability of the clients.
        num_examples_of: returns the number of training examples of a client, which determines its local steps.
    """

    def __init__(
        self, engine: Engine, system: SystemModel, num_examples_of: Callable[[ClientId], int] = lambda client: 1
    ) -> None:
        super().__init__(engine)
        self.system, self._elapsed_s = system, 0.0
        self._num_examples_of = num_examples_of
        self._strategy: Strategy | None = None
        self._arrivals: dict[RequestKey, Arrival] = {}
        self._deferred = DeferredTraining(engine)

    @property
    def elapsed_s(self) -> float:
        """Duration of the last `fit`, in virtual seconds."""
        return self._elapsed_s

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Yield the failures of the virtual clock, then train the clients whose response comes in time.

        If the training of a client fails, the next client by time of response takes its place. Results of one call of
        the inner engine are in ascending order of client ids.

        Raises:
            SettingError: A round that closes early would break the sampling law of a privacy guarantee.
        """
        refuse_early_end(strategy, self.system.min_completed, "system.min_completed")
        workload_of = self._workload_of(request, strategy)
        arrivals = {client: self._arrival(request, client, workload_of) for client in sorted(cohort)}
        pending = sorted((arrival.seconds, c) for c, arrival in arrivals.items() if not arrival.failure_reason)
        target, completed, closed = self.system.min_completed or len(pending), 0, 0.0
        for client, arrival in arrivals.items():
            if arrival.failure_reason:
                yield _failure(client, arrival.failure_reason)
        while pending and completed < target:
            batch, pending = pending[: target - completed], pending[target - completed :]
            closed, completed = batch[-1][0], completed + len(batch)
            for result in self.engine.fit(request, strategy, sorted(client for _, client in batch)):
                completed -= isinstance(result, Failure)  # a pending client takes the place of a failed client
                yield result
        if completed < target or self.system.min_completed is None:
            closed = max((arrival.seconds for arrival in arrivals.values()), default=0.0)
        self._elapsed_s = closed
        reason = f"the round closed with {target} other updates"
        yield from (Failure(client=client, stage=FailureStage.NOT_NEEDED, reason=reason) for _, client in pending)

    def wait_for_next(self, strategy: Strategy, in_flight: Sequence[InFlight], clock: float) -> Completion:
        """Return the next completion. Training is deferred and batched with other clients (`DeferredTraining`)."""
        known = self._arrivals if strategy is self._strategy else {}
        self._strategy, keys = strategy, [request_key(item) for item in in_flight]
        self._arrivals = {
            key: known.get(key) or self._arrival(item.request, item.client, self._workload_of(item.request, strategy))
            for key, item in zip(keys, in_flight, strict=True)
        }
        arrivals = [self._arrivals[key] for key in keys]
        times = [item.request.clock + arrival.seconds for item, arrival in zip(in_flight, arrivals, strict=True)]
        by_time = sorted(range(len(in_flight)), key=lambda i: (times[i], in_flight[i].client))
        first, failure_reason = by_time[0], arrivals[by_time[0]].failure_reason
        if failure_reason:
            result: Updates | Failure = _failure(in_flight[first].client, failure_reason)
        elif isinstance(self.engine, AsyncEngine):  # real clients train as soon as they receive a request
            result = self.engine.wait_for_next(strategy, [in_flight[first]], in_flight[first].request.clock).result
        else:
            due = [in_flight[i] for i in by_time if not arrivals[i].failure_reason]
            result = self._deferred.next_result(strategy, due)
        return Completion(first, result, max(clock, times[first]))

    def _workload_of(self, request: Request, strategy: Strategy) -> Callable[[ClientId], Workload]:
        """Return a function that gives the workload of a client for this request."""
        if self.system.device is None:
            return lambda client: Workload()
        vector_bytes = 4 * self.layout.num_parameters
        bytes_down = vector_bytes + sum(4 * int(np.prod(v.shape)) for v in request.broadcast.values())
        bytes_up = _update_bytes(strategy, request, self.layout) + vector_bytes * len(extra_names(strategy.local))
        return lambda client: Workload(request.local.num_steps(self._num_examples_of(client)), bytes_down, bytes_up)

    def _arrival(self, request: Request, client: ClientId, workload_of: Callable[[ClientId], Workload]) -> Arrival:
        """Return the time of the client's response, or of its failure."""
        return self.system.arrival(request.seed, client, request.round, workload_of(client), clock=request.clock)


def _failure(client: ClientId, reason: str) -> Failure:
    return Failure(client=client, stage=FailureStage.NODE, reason=reason)


def _update_bytes(strategy: Strategy, request: Request, layout: Layout) -> int:
    """Return the size of the update that a client sends, in bytes."""
    if strategy.codec is not None:
        return estimate_bytes(strategy.codec, strategy.shared_layout(layout))
    numbers, dtype = update_size_and_dtype(strategy, request, layout)
    return numbers * dtype.itemsize
