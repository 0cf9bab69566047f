"""Train blocks of clients on a Ray cluster, with several machines or GPUs.

Shapes: K clients in a block, D parameters.

Each worker builds the scenario once and keeps it, so the engine sends no training data. In a round a worker receives
the request and the client states of its block. It returns one partial aggregate. If the aggregator cannot merge partial
aggregates, it returns the updates. A round does not depend on the memory of a worker. If a worker dies, a new worker
runs its block again.

This module schedules blocks and replaces workers itself, because Ray's own tools lose guarantees (ray 2.55.1, two
workers):

- `ray.util.ActorPool.map` returns an actor to the pool only when its result is read, in order. One block of 4 s and
  eight of 0.5 s take 6 s. They take 4 s if an idle worker gets the next block at once. The pool also sends blocks to a
  dead actor: 3 of 6 blocks fail.
- ``max_task_retries`` runs the block of a stuck worker again after ``ray.kill``, and the next block waits for it.
  ``max_restarts`` alone saves four statements, but does not check the model of the new process.
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
from fedlearn.core.threads import available_cores
from fedlearn.engines.ray.cluster import Cluster, ClusterError, WorkerDied, WorkerResponse, copy_arrays
from fedlearn.errors import is_count, is_number, require
from fedlearn.loop.base_engine import BaseEngine, engine_builder
from fedlearn.loop.client_update import initial_client_state
from fedlearn.loop.protocols import Trainer
from fedlearn.trainers.contract import check_data, warn_about

MAX_ATTEMPTS = 3  # attempts per block; after that, the block itself is the probable cause
MIN_BLOCK_SIZE = 8  # clients per block; a larger cohort has more blocks than workers, so that no worker is idle

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
        data: data of the scenario.
        trainer: trainer of the scenario; it gives the layout and evaluates a pooled test set.
        rebuild: picklable function that builds the same `Scenario` in each worker. With GPUs the engine calls it with
            ``device="cuda:0"``, the first GPU that Ray assigns to a worker.
        address: address of a cluster that includes this machine: ``auto`` or ``host:port``. None: the cluster that this
            process is connected to, or a new cluster on this machine for the run.
        num_workers: number of workers, >= 1; None: all that fit on the cluster.
        gpus_per_worker: GPUs per worker, default 0. 0: workers use CPUs only; a share in (0, 1): workers share a GPU.
        block_size: clients per block, >= 1. None: an equal share per worker. A large cohort on CPUs then has up to four
            blocks per worker, which balances clients with different durations.
        timeout: seconds for a worker to start, and for a block, > 0, default 600.

    Guarantees:
        The model is equal to the model of the engine ``vector``, up to the rounding of float64 sums. With a
        ``block_size`` it does not depend on the number of workers. A dead worker is replaced, and its clients run again
        with the same result. ``timeout`` limits each wait. `RayEngine.close` ends only processes that this engine
        started.

    All machines need the same versions of Python, ray and fedlearn, and the data at the path that the scenario reads.

    Raises:
        MissingExtra: Ray is not installed.
        SettingError: A setting is out of range, or exceeds the resources of the cluster.
        ClusterError: There is no cluster at ``address``, or a worker cannot start.
    """
    _check(trainer, num_workers, gpus_per_worker, block_size, timeout)
    warn_about(check_data(trainer, data))
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
    """Train blocks of clients on the workers of a cluster. `ray` builds this engine.

    Attributes:
        clients, layout, client_states: see `fedlearn.loop.protocols.Engine`.
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
        self._max_blocks = 1  # blocks per worker and round
        self._pids: dict[Any, int] = {}  # worker -> process id
        self._strategy: tuple[Strategy | None, Any] = (None, None)

    def start(self, num_workers: int | None, gpus_per_worker: float) -> None:
        """Start the workers, each of which builds the scenario. `ray` calls this method once."""
        resources, room = self._cluster.resources, _room(self._cluster.resources, gpus_per_worker)
        capacity = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        is_possible = bool(room) or not gpus_per_worker
        require(is_possible, "gpus_per_worker", gpus_per_worker, f"a number that fits {capacity}", "gpus_per_worker=0")
        expected = f"at most {room}, the capacity of {capacity}"
        require((num_workers or 1) <= room, "num_workers", num_workers, expected, f"num_workers={room}")
        self.num_workers = num_workers or min(room, len(self.clients))
        self._max_blocks = 1 if gpus_per_worker else 4  # a GPU trains all clients of a block at once
        self._actor = self._cluster.actor(gpus_per_worker)
        self._fill_up()

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Train the cohort; yield a partial aggregate for each block, or its updates, in order of client ids."""
        shared = copy_arrays(replace(request, client_models={}))
        request_ref, strategy_ref = self._cluster.put(shared, "the request"), self._reference(strategy)
        has_states = bool(initial_client_state(strategy, self.layout, request.params_D))

        def submit(worker: Any, block: Sequence[ClientId]) -> Any:
            states = self._client_states_of(block) if has_states else {}
            models = copy_arrays(request.for_clients(block).client_models)
            return worker.fit.remote(request_ref, strategy_ref, block, states, models)

        for response in self._responses(submit, self._blocks(cohort), f"round {request.round}"):
            self.client_states.update(copy_arrays(response.client_states))
            yield from response.results

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[Predictions | Failure]:
        """Yield the outputs of the model, or of each personal model, on the held-out data of each client."""
        model_ref = self._cluster.put(copy_arrays(params_D), "the model")
        strategy_ref = self._reference(personal_strategy) if personal_strategy else None

        def submit(worker: Any, block: Sequence[ClientId]) -> Any:
            states = self._client_states_of(block) if personal_strategy else {}
            return worker.evaluate.remote(model_ref, strategy_ref, block, states)

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
        """Process id of each worker, on the machine of the worker."""
        return tuple(self._pids.values())

    def describe(self, cohort_size: int) -> str:
        """Return how a cohort of this size is trained, for the header."""
        largest = max(map(len, self._blocks(range(cohort_size))), default=0)
        return f"{self.num_workers} worker{'s' * (self.num_workers != 1)}, up to {largest} clients each at a time"

    def close(self) -> None:
        """End the workers, and the cluster if this engine started it; a second call has no effect."""
        self._drop(list(self._pids))
        self._cluster.close()

    def _blocks(self, cohort: Sequence[ClientId]) -> list[Sequence[ClientId]]:
        """Cut the sorted cohort into blocks whose sizes differ by one client at most.

        Block sizes are numbers of clients, not of examples. The numbers of examples are not known here, and JAX
        compiles again for each new block size.
        """
        ascending = sorted(int(client) for client in cohort)
        if self._block_size:
            number = -(-len(ascending) // self._block_size)
        else:
            per_worker = min(self._max_blocks, max(1, len(ascending) // (self.num_workers * MIN_BLOCK_SIZE)))
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
            self._drop([running_task.worker for running_task in running.values()])

    def _first(self, running: Mapping[Any, _RunningTask]) -> Any:
        """Wait for the first block to complete; return its reference."""
        first_due = min(running.values(), key=lambda running_task: running_task.due)
        ready = self._cluster.wait(list(running), max(0.0, first_due.due - time.monotonic()))
        if not ready:
            raise ClusterError(
                f"a worker took longer than engine.timeout={self._timeout:g} s for {first_due.task}\n"
                f"  try       engine.timeout={10 * self._timeout:g}"
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
        starting = {worker.ready.remote(): worker for worker in new}
        ready = self._cluster.wait(list(starting), self._timeout, count=len(starting)) if starting else []
        if len(ready) < len(starting):
            raise ClusterError(
                f"{len(ready)} of {len(starting)} workers started within engine.timeout={self._timeout:g} s\n"
                "  advice    a smaller engine.num_workers, if other programs use the cluster too"
            )
        for ref, worker in starting.items():
            digest, self._pids[worker] = self._cluster.get(ref, self._timeout, doing="building the scenario")
            if digest != self.layout.digest:
                raise ClusterError(
                    "a worker built a model with other parameters\n"
                    "  advice    the same versions of code and data on all machines"
                )

    def _drop(self, workers: Sequence[Any]) -> None:
        for worker in workers:
            self._pids.pop(worker, None)
            self._cluster.kill(worker)


@dataclass(frozen=True, slots=True)
class _BlockTask:
    """A block of clients to run.

    Attributes:
        number: position of the block in the cohort, from 0.
        block: ids of the clients.
        purpose: text for messages, such as ``round 3``.
        attempt: number of the attempt, from 1 to `MAX_ATTEMPTS`.
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
                "  advice    fewer workers or a smaller engine.block_size, if memory ran out"
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
    is_valid = num_workers is None or is_count(num_workers)
    require(is_valid, "num_workers", num_workers, "null (all that fit), or a whole number >= 1", "num_workers=2")
    is_valid = is_number(gpus_per_worker, at_least=0) and (
        gpus_per_worker < 1 or gpus_per_worker == int(gpus_per_worker)
    )
    require(is_valid, "gpus_per_worker", gpus_per_worker, "a whole number, or a share in [0, 1)", "gpus_per_worker=1")
    is_valid = bool(gpus_per_worker) or trainer.device == "cpu"
    expected = f"more than 0, for device={trainer.device}"
    require(is_valid, "gpus_per_worker", gpus_per_worker, expected, "gpus_per_worker=1")
    is_valid = block_size is None or is_count(block_size)
    require(is_valid, "block_size", block_size, "null (automatic), or a whole number >= 1", "block_size=null")
    is_valid = is_number(timeout, at_least=0) and timeout > 0
    require(is_valid, "timeout", timeout, "a number of seconds > 0", "timeout=600")


def _room(resources: Mapping[str, float], gpus_per_worker: float) -> int:
    """Return the number of workers that fit on the cluster."""
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if not gpus_per_worker:
        return cpus
    return min(cpus, int(gpus // gpus_per_worker) if gpus_per_worker >= 1 else gpus * int(1 / gpus_per_worker))
