"""The engine for more than one machine or GPU: it trains blocks of clients on a Ray cluster.

Shapes: K clients in a block, D parameters.

Each worker builds the scenario itself and keeps it, so no training data is sent. In a round a worker receives the
request and the client states of its block. It returns one partial aggregate, or the updates where the aggregator cannot
merge. A worker keeps nothing that a round depends on. If a worker dies, a new worker runs its block again.

Scheduling and replacement are here, because Ray's own parts lose guarantees (ray 2.55.1, two workers):

- `ray.util.ActorPool.map` returns an actor to the pool only when its result is read, in order. One block of 4 s and
  eight of 0.5 s take 6 s, and 4 s if an idle worker gets the next block at once. The pool still sends blocks to an
  actor that died: 3 of 6 fail.
- ``max_task_retries`` runs the block of a hung worker again after ``ray.kill``, and the next block waits for it.
  Without it, ``max_restarts`` saves four statements, and the model of the new process is not checked.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import Array, ClientId, Failure, Predictions, Request, State, Updates
from fedlearn.engines.ray.cluster import Cluster, ClusterError, WorkerDied, WorkerResponse, copy_arrays
from fedlearn.errors import is_count, is_number, require
from fedlearn.loop.base_engine import BaseEngine, engine_builder
from fedlearn.loop.client_update import initial_client_state
from fedlearn.loop.protocols import Trainer
from fedlearn.trainers.base import available_cores

MAX_ATTEMPTS = 3  # per block; then the block itself is the probable cause
MIN_BLOCK_SIZE = 8  # clients; larger cohorts are cut into more blocks than workers, to keep all busy

log = logging.getLogger(__name__)


@engine_builder(rebuilds_scenario=True)
def ray(
    data: FederatedData,
    trainer: Trainer,
    rebuild: Callable[..., Any],
    *,
    address: str | None = None,
    num_workers: int | None = None,
    gpus_per_worker: float = 0,
    block_size: int | None = None,
    timeout: float = 600.0,
) -> RayEngine:
    """Return an engine whose workers run on a Ray cluster, each with one core or one GPU.

    Args:
        data: the data of the scenario.
        trainer: the trainer of the scenario; it gives the layout and evaluates a pooled test set.
        rebuild: function that builds the same `Scenario` in each worker; Ray must be able to send it. With GPUs it is
            called with ``device="cuda:0"``, the first GPU that Ray lets a worker see.
        address: address of a cluster that this machine is part of: ``auto`` or ``host:port``. None takes the cluster
            that this process is connected to, or starts one on this machine for the run.
        num_workers: number of workers, >= 1; None takes all that fit on the cluster.
        gpus_per_worker: GPUs per worker; 0 computes on CPUs, a share in (0, 1) lets workers share a GPU.
        block_size: clients per block, >= 1. None gives each worker an equal share. Large cohorts on CPUs are then cut
            into up to four blocks per worker, which balances uneven clients.
        timeout: seconds for a worker to start, and for a block, > 0.

    *Guarantees*: the model equals that of the engine ``vector``, up to the rounding of float64 sums. With
    ``block_size`` set it does not depend on the number of workers. A worker that dies is replaced, and its clients run
    again with the same result. Every wait is bounded by ``timeout``. `RayEngine.close` ends only processes that this
    engine started.

    All machines need the same versions of Python, ray and fedlearn, and the data in the place that the scenario reads.

    Raises:
        MissingExtra: ray is not installed.
        SettingError: a setting is out of range, or exceeds the resources of the cluster.
        ClusterError: there is no cluster at ``address``, or a worker cannot start.
    """
    _check(trainer, num_workers, gpus_per_worker, block_size, timeout)
    build = partial(rebuild, device="cuda:0") if gpus_per_worker else rebuild
    cpus = min(available_cores(), num_workers or len(data.clients))
    cluster = Cluster(address, cpus=cpus, timeout=timeout)
    engine = RayEngine(cluster, data, trainer, rebuild=build, block_size=block_size, timeout=timeout)
    try:
        engine.start(num_workers, gpus_per_worker)
    except BaseException:
        engine.close()
        raise
    return engine


class RayEngine(BaseEngine):
    """An engine that runs blocks of clients on the workers of a cluster; built by `ray`.

    Attributes:
        clients, layout, client_states: as in `fedlearn.loop.protocols.Engine`.
        num_workers: number of workers.
    """

    def __init__(
        self,
        cluster: Cluster,
        data: FederatedData,
        trainer: Trainer,
        *,
        rebuild: Callable[[], Any],
        block_size: int | None,
        timeout: float,
    ) -> None:
        super().__init__(data.clients, trainer.layout)
        self.num_workers = 0
        self._cluster, self._rebuild = cluster, rebuild
        self._timeout, self._block_size = timeout, block_size
        self._most_blocks = 1  # per worker and round
        self._pids: dict[Any, int] = {}  # worker -> process id
        self._strategy: tuple[Strategy | None, Any] = (None, None)

    def start(self, num_workers: int | None, gpus_per_worker: float) -> None:
        """Start the workers; each builds the scenario. `ray` calls this once."""
        has, room = self._cluster.resources, _room(self._cluster.resources, gpus_per_worker)
        capacity = f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
        fits = bool(room) or not gpus_per_worker
        require(fits, "gpus_per_worker", gpus_per_worker, f"a number that fits {capacity}", "gpus_per_worker=0")
        expected = f"at most {room}, the capacity of {capacity}"
        require((num_workers or 1) <= room, "num_workers", num_workers, expected, f"num_workers={room}")
        self.num_workers = num_workers or min(room, len(self.clients))
        self._most_blocks = 1 if gpus_per_worker else 4  # a GPU trains all clients of a block at once
        self._actor = self._cluster.actor(gpus_per_worker)
        self._fill_up()

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Train the cohort; yield a partial aggregate for each block, or its updates, in order of client ids."""
        sent, rule = self._cluster.put(copy_arrays(request), "the request"), self._reference(strategy)
        has_states = bool(initial_client_state(strategy, self.layout, request.params_D))

        def submit(worker: Any, block: Sequence[ClientId]) -> Any:
            return worker.fit.remote(sent, rule, block, self._client_states_of(block) if has_states else {})

        for response in self._responses(submit, self._blocks(cohort), f"round {request.round}"):
            self.client_states.update(copy_arrays(response.client_states))
            yield from response.results

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[Predictions | Failure]:
        """Yield the outputs of the model, or of each personal model, on the held-out data of each client."""
        sent, rule = (
            self._cluster.put(copy_arrays(params_D), "the model"),
            self._reference(personal_strategy) if personal_strategy else None,
        )

        def submit(worker: Any, block: Sequence[ClientId]) -> Any:
            return worker.evaluate.remote(sent, rule, block, self._client_states_of(block) if personal_strategy else {})

        for response in self._responses(submit, self._blocks(cohort), "evaluation"):
            yield from response.results

    def _reference(self, strategy: Strategy) -> list[Any]:
        """Return a reference to the strategy; the list keeps Ray from resolving it before the worker needs it."""
        if strategy is not self._strategy[0]:
            self._strategy = (strategy, self._cluster.put(strategy, "the strategy"))
        return [self._strategy[1]]

    def _client_states_of(self, block: Sequence[ClientId]) -> dict[ClientId, State]:
        return {client: self.client_states[client] for client in block if client in self.client_states}

    @property
    def pids(self) -> Sequence[int]:
        """The process id of each worker, on its own machine."""
        return tuple(self._pids.values())

    def describe(self, cohort_size: int) -> str:
        """Return how a cohort of this size is trained, for the header."""
        most = max(map(len, self._blocks(range(cohort_size))), default=0)
        return f"{self.num_workers} worker{'s' * (self.num_workers != 1)}, up to {most} clients each at a time"

    def close(self) -> None:
        """End the workers, and the cluster if this engine started it; a second call has no effect."""
        self._drop(list(self._pids))
        self._cluster.close()

    def _blocks(self, cohort: Sequence[ClientId]) -> list[Sequence[ClientId]]:
        """Cut the sorted cohort into blocks whose sizes differ by one client at most.

        Blocks count clients, not examples: numbers of examples are not known here, and JAX compiles again for each new
        block size.
        """
        ascending = sorted(int(client) for client in cohort)
        if self._block_size:
            number = -(-len(ascending) // self._block_size)
        else:
            per_worker = min(self._most_blocks, max(1, len(ascending) // (self.num_workers * MIN_BLOCK_SIZE)))
            number = min(len(ascending), per_worker * self.num_workers)
        ends = np.linspace(0, len(ascending), number + 1).round().astype(int).tolist() if number else [0]
        return [ascending[start:end] for start, end in pairwise(ends)]

    def _responses(
        self, submit: Callable[[Any, Sequence[ClientId]], Any], blocks: Sequence[Sequence[ClientId]], purpose: str
    ) -> Iterator[WorkerResponse]:
        """Yield responses in the order of the blocks; an idle worker gets the next block at once."""
        self._fill_up()
        waiting, running, done = deque(_BlockTask(i, block, purpose) for i, block in enumerate(blocks)), {}, {}
        idle = deque(self._pids)
        try:
            for number in range(len(blocks)):
                while number not in done:
                    while idle and waiting:
                        task, worker = waiting.popleft(), idle.popleft()
                        due = time.monotonic() + self._timeout
                        running[submit(worker, task.block)] = _RunningTask(task, worker, due)
                    ended = running[ref := self._first(running)]
                    try:
                        done[ended.task.number] = self._cluster.get(ref, self._timeout, doing=str(ended.task))
                        idle.append(ended.worker)
                    except WorkerDied as error:
                        waiting.appendleft(ended.task.again(error))
                        idle.append(self._replace_worker(ended))
                    del running[ref]
                yield done.pop(number)
        finally:  # the results of tasks that still run are not needed
            self._drop([each.worker for each in running.values()])

    def _first(self, running: Mapping[Any, _RunningTask]) -> Any:
        """Wait for the first block to complete; return its reference."""
        first_due = min(running.values(), key=lambda each: each.due)
        ready = self._cluster.wait(list(running), max(0.0, first_due.due - time.monotonic()))
        if not ready:
            raise ClusterError(
                f"a worker took longer than engine.timeout={self._timeout:g} s for {first_due.task}\n"
                f"  try       engine.timeout={10 * self._timeout:g}, or a smaller engine.block_size"
            )
        return ready[0]

    def _replace_worker(self, ended: _RunningTask) -> Any:
        """Start a worker in place of a lost one, and return it."""
        log.warning("%s: worker process %d is gone; a new worker runs it again", ended.task, self._pids[ended.worker])
        self._drop([ended.worker])
        self._fill_up()
        return list(self._pids)[-1]

    def _fill_up(self) -> None:
        """Start missing workers and wait until each has built the scenario."""
        new = [self._actor.remote(self._rebuild) for _ in range(self.num_workers - len(self._pids))]
        self._pids |= dict.fromkeys(new, 0)
        began = {worker.ready.remote(): worker for worker in new}
        ready = self._cluster.wait(list(began), self._timeout, count=len(began)) if began else []
        if len(ready) < len(began):
            raise ClusterError(
                f"{len(ready)} of {len(began)} workers started within engine.timeout={self._timeout:g} s\n"
                "  try       a smaller engine.num_workers, if others use the cluster too"
            )
        for ref, worker in began.items():
            digest, self._pids[worker] = self._cluster.get(ref, self._timeout, doing="building the scenario")
            if digest != self.layout.digest:
                raise ClusterError("a worker built a model with other parameters: it has other code or other settings")

    def _drop(self, workers: Sequence[Any]) -> None:
        for worker in workers:
            self._pids.pop(worker, None)
            self._cluster.kill(worker)


@dataclass(frozen=True, slots=True)
class _BlockTask:
    """A block of clients to run.

    Attributes:
        number: position among the blocks.
        block: its clients.
        purpose: text for messages, such as ``round 3``.
        attempt: from 1 to `MAX_ATTEMPTS`.
    """

    number: int
    block: Sequence[ClientId]
    purpose: str
    attempt: int = 1

    def again(self, error: WorkerDied) -> _BlockTask:
        """Return the next attempt at this task; raise after `MAX_ATTEMPTS`."""
        if self.attempt == MAX_ATTEMPTS:
            raise ClusterError(
                f"{MAX_ATTEMPTS} workers died, one after another, at {error}\n"
                "  try       fewer workers or a smaller engine.block_size, if memory ran out"
            ) from error
        return replace(self, attempt=self.attempt + 1)

    def __str__(self) -> str:
        ids = str(self.block[0]) if len(self.block) == 1 else f"{self.block[0]} to {self.block[-1]}"
        return f"{self.purpose}, {len(self.block)} client{'s' * (len(self.block) != 1)} ({ids})"


class _RunningTask(NamedTuple):
    """A task that a worker runs, with its deadline."""

    task: _BlockTask
    worker: Any
    due: float


def _check(
    trainer: Trainer, num_workers: int | None, gpus_per_worker: float, block_size: int | None, timeout: float
) -> None:
    ok = num_workers is None or is_count(num_workers)
    require(ok, "num_workers", num_workers, "null (all that fit), or a whole number >= 1", "num_workers=2")
    ok = is_number(gpus_per_worker, at_least=0) and (gpus_per_worker < 1 or gpus_per_worker == int(gpus_per_worker))
    require(ok, "gpus_per_worker", gpus_per_worker, "a whole number, or a share in [0, 1)", "gpus_per_worker=1")
    ok = bool(gpus_per_worker) or trainer.device == "cpu"
    expected = f"more than 0, for device={trainer.device}"
    require(ok, "gpus_per_worker", gpus_per_worker, expected, "gpus_per_worker=1")
    ok = block_size is None or is_count(block_size)
    require(ok, "block_size", block_size, "null (automatic), or a whole number >= 1", "block_size=null")
    ok = is_number(timeout, at_least=0) and timeout > 0
    require(ok, "timeout", timeout, "seconds, > 0", "timeout=600")


def _room(resources: Mapping[str, float], gpus_per_worker: float) -> int:
    """Return the number of workers that fit on the cluster."""
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if not gpus_per_worker:
        return cpus
    return min(cpus, int(gpus // gpus_per_worker) if gpus_per_worker >= 1 else gpus * int(1 / gpus_per_worker))
