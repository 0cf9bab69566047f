"""The engine for more than one machine or GPU: blocks of clients on a Ray cluster; the only home of ray.

Shapes: K clients in a block, D parameters laid flat.

One actor per worker builds the scenario for itself and keeps it, so that no data travel. A round sends each worker the
order and, where clients remember something, their memories; what comes back is one fold for a whole block of clients,
or their updates where the aggregator cannot merge folds. A worker keeps nothing that a round depends on: where one
dies, or its machine, another is started and the block is run again.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, is_dataclass, replace
from dataclasses import fields as fields_of
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate, accumulate
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import Array, ClientId, Failure, Predictions, Request, State, Updates
from fedlearn.engines.base import MAX_BLOCK_BYTES, InProcessEngine
from fedlearn.engines.ray.compat import session_folder, verify_version, without_worker_notices
from fedlearn.errors import FedlearnError, MissingExtra, is_count, is_number, require
from fedlearn.loop.client_update import initial_client_state
from fedlearn.loop.protocols import Trainer
from fedlearn.trainers.base import available_cores

MAX_ATTEMPTS = 3  # at one block: a third death is taken for the block's own doing
MIN_BLOCK_SIZE = 8  # clients; a cohort that is large enough is cut into more blocks than workers, to keep all busy
CONNECT_TIMEOUT_S = 5.0  # seconds for a cluster to answer at all
MAX_TEMP_PATH_LENGTH = (
    32  # characters of a temporary folder that leave room for the names of Ray's sockets, which may have 107
)

log = logging.getLogger(__name__)


class ClusterError(FedlearnError):
    """The cluster cannot be reached, a worker cannot do its work, or one took too long."""


class _Lost(ClusterError):
    """A worker is gone, and with it what it was doing."""


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
    """Workers on a Ray cluster, each with one core, or with a GPU of its own.

    Args:
        data: the scenario's.
        trainer: the scenario's; here it only tells the layout, and judges a pooled test set.
        rebuild: builds the same `Scenario` again, in each worker: a function that can be pickled. Where workers have
            GPUs it is called with ``device="cuda:0"``, which is the first GPU that Ray lets a worker see.
        address: of a cluster that this machine is part of: ``auto`` or ``host:port``. None starts one on this machine
            for the time of the run, or takes the one that this process is connected to already.
        num_workers: None takes all that the cluster has room for.
        gpus_per_worker: 0 computes on CPUs; a share in (0, 1) lets workers share a GPU.
        block_size: clients that a worker is handed at a time. None: an equal share each; large cohorts on CPUs in up to
            four blocks a worker, so that all stay busy though clients are uneven.
        timeout: seconds that a worker may take to start, and for a block, > 0.

    *Guarantees*: the model of the engine ``vector``, up to the rounding of float64 sums; with ``block_size`` set it
    does not depend on the number of workers. A worker that dies is replaced and its clients run again, with the same
    result. Waiting is bounded by ``timeout``. `RayEngine.close` ends what this engine has started and nothing else.

    All machines need the same versions of Python, ray and fedlearn, and the data where the scenario looks for them.

    Raises:
        MissingExtra: ray is not installed.
        SettingError: a setting is out of range, or the cluster has less than is asked for.
        ClusterError: there is no cluster at ``address``, or a worker cannot start.
    """
    _check(trainer, num_workers, gpus_per_worker, block_size, timeout)
    made = partial(rebuild, device="cuda:0") if gpus_per_worker else rebuild
    cpus = min(available_cores(), num_workers or len(data.clients))
    cluster = _Cluster(address, cpus=cpus, timeout=timeout)
    engine = RayEngine(cluster, data, trainer, rebuild=made, block_size=block_size, timeout=timeout)
    try:
        engine.start(num_workers, gpus_per_worker)
    except BaseException:
        engine.close()
        raise
    return engine


class RayEngine:
    """Runs blocks of clients on the workers of a cluster; made by `ray`.

    Attributes:
        clients, layout, memories: as in every engine.
        num_workers: how many there are.
    """

    deployed = False

    def __init__(
        self,
        cluster: _Cluster,
        data: FederatedData,
        trainer: Trainer,
        *,
        rebuild: Callable[[], Any],
        block_size: int | None,
        timeout: float,
    ) -> None:
        self.clients, self.layout = data.clients, trainer.layout
        self.client_states: dict[ClientId, State] = {}
        self.num_workers = 0
        self._cluster, self._rebuild = cluster, rebuild
        self._timeout, self._block_size = timeout, block_size
        self._most_blocks = 1  # of one worker in one round
        self._pids: dict[Any, int] = {}  # of each worker
        self._strategy: tuple[Strategy | None, Any] = (None, None)

    def start(self, num_workers: int | None, gpus_per_worker: float) -> None:
        """Start the workers, each of which builds the scenario; part of `ray`."""
        has, room = self._cluster.resources, _room(self._cluster.resources, gpus_per_worker)
        all_there_is = f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
        fits = bool(room) or not gpus_per_worker
        require(fits, "gpus_per_worker", gpus_per_worker, f"what fits on {all_there_is}", "gpus_per_worker=0")
        expected = f"at most {room}, which is what fits on {all_there_is}"
        require((num_workers or 1) <= room, "num_workers", num_workers, expected, f"num_workers={room}")
        self.num_workers = num_workers or min(room, len(self.clients))
        self._most_blocks = 1 if gpus_per_worker else 4  # a GPU trains all clients of a block at once
        self._actor = self._cluster.actor(gpus_per_worker)
        self._fill_up()

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Train the cohort: one fold for each block, or its updates, in ascending order of client ids."""
        sent, rule = self._cluster.put(copy_arrays(request), "the order"), self._known(strategy)
        remembers = bool(initial_client_state(strategy, self.layout, request.params_D))

        def submit(worker: Any, block: Sequence[ClientId]) -> Any:
            return worker.fit.remote(sent, rule, block, self._memories_of(block) if remembers else {})

        for reply in self._replies(submit, self._blocks(cohort), f"round {request.round}"):
            self.client_states.update(copy_arrays(reply.memories))
            yield from reply.results

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[Predictions | Failure]:
        """The outputs of the model, or of each client's own, on the held-out part of each client."""
        sent, rule = (
            self._cluster.put(copy_arrays(params_D), "the model"),
            self._known(personal_strategy) if personal_strategy else None,
        )

        def submit(worker: Any, block: Sequence[ClientId]) -> Any:
            return worker.evaluate.remote(sent, rule, block, self._memories_of(block) if personal_strategy else {})

        for reply in self._replies(submit, self._blocks(cohort), "evaluation"):
            yield from reply.results

    def _known(self, strategy: Strategy) -> list[Any]:
        """A reference to the strategy, in a list so that Ray leaves it to the worker to follow."""
        if strategy is not self._strategy[0]:
            self._strategy = (strategy, self._cluster.put(strategy, "the strategy"))
        return [self._strategy[1]]

    def _memories_of(self, block: Sequence[ClientId]) -> dict[ClientId, State]:
        return {client: self.client_states[client] for client in block if client in self.client_states}

    @property
    def pids(self) -> Sequence[int]:
        """The workers' processes, each as its own machine numbers them."""
        return tuple(self._pids.values())

    def describe(self, cohort_size: int) -> str:
        """How a cohort of so many clients is trained, for the header."""
        most = max(map(len, self._blocks(range(cohort_size))), default=0)
        return f"{self.num_workers} worker{'s' * (self.num_workers != 1)}, up to {most} clients each at a time"

    def close(self) -> None:
        """End the workers, and the cluster if it was started for this engine; harmless when called twice."""
        self._drop(list(self._pids))
        self._cluster.close()

    def _blocks(self, cohort: Sequence[ClientId]) -> list[Sequence[ClientId]]:
        """The cohort in ascending order, in blocks that differ by one client at most.

        They are cut by number of clients: sizes in examples would have to be asked for, and blocks of ever different
        length compiled anew.
        """
        ascending = sorted(int(client) for client in cohort)
        if self._block_size:
            number = -(-len(ascending) // self._block_size)
        else:
            a_worker = min(self._most_blocks, max(1, len(ascending) // (self.num_workers * MIN_BLOCK_SIZE)))
            number = min(len(ascending), a_worker * self.num_workers)
        ends = np.linspace(0, len(ascending), number + 1).round().astype(int).tolist() if number else [0]
        return [ascending[start:end] for start, end in pairwise(ends)]

    def _replies(
        self, submit: Callable[[Any, Sequence[ClientId]], Any], blocks: Sequence[Sequence[ClientId]], what: str
    ) -> Iterator[_Reply]:
        """What workers reply, in the order of the blocks; a worker that is done gets the next block at once."""
        self._fill_up()
        waiting, running, done = deque(_Task(i, block, what) for i, block in enumerate(blocks)), {}, {}
        idle = deque(self._pids)
        try:
            for number in range(len(blocks)):
                while number not in done:
                    while idle and waiting:
                        task, worker = waiting.popleft(), idle.popleft()
                        running[submit(worker, task.block)] = _Running(task, worker, time.monotonic() + self._timeout)
                    one = running[ref := self._first(running)]
                    try:
                        done[one.task.number] = self._cluster.get(ref, self._timeout, doing=str(one.task))
                        idle.append(one.worker)
                    except _Lost as error:
                        waiting.appendleft(one.task.again(error))
                        idle.append(self._replaced(one))
                    del running[ref]
                yield done.pop(number)
        finally:  # whatever is still at work here is at work for nobody
            self._drop([one.worker for one in running.values()])

    def _first(self, running: Mapping[Any, _Running]) -> Any:
        """The first block that is done."""
        first_due = min(running.values(), key=lambda one: one.due)
        ready = self._cluster.wait(list(running), max(0.0, first_due.due - time.monotonic()))
        if not ready:
            raise ClusterError(
                f"a worker took longer than engine.timeout={self._timeout:g} s for {first_due.task}\n"
                f"  try       engine.timeout={10 * self._timeout:g}, or a smaller engine.block_size"
            )
        return ready[0]

    def _replaced(self, one: _Running) -> Any:
        """A new worker in place of one that is gone."""
        log.warning("%s: worker process %d is gone; a new one runs it again", one.task, self._pids[one.worker])
        self._drop([one.worker])
        self._fill_up()
        return list(self._pids)[-1]

    def _fill_up(self) -> None:
        """As many workers as there should be, all with the scenario built."""
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


class Worker:
    """One process of the cluster. It keeps the scenario, and nothing that a round depends on."""

    def __init__(self, rebuild: Callable[[], Any]) -> None:
        self._rebuild = rebuild
        self._engine: InProcessEngine | None = None
        self._strategy: tuple[Any, Any] = (None, None)

    def ready(self) -> tuple[str, int]:
        """Build the scenario; the digest of its layout, and this process."""
        return self._local().layout.digest, os.getpid()

    def fit(
        self,
        request: Request,
        strategy_ref: Sequence[Any],
        block: Sequence[ClientId],
        client_states: Mapping[ClientId, State],
    ) -> _Reply:
        """Train one block; ``strategy_ref`` holds a reference to the strategy, fetched when it is a new one."""
        engine, strategy = self._local(), self._known(strategy_ref[0])
        engine.client_states = dict(copy_arrays(client_states))
        results = [_without_memory(result) for result in engine.fit(copy_arrays(request), strategy, block)]
        return _Reply(results=copy_arrays(_folded(strategy, engine, results)), memories=engine.client_states)

    def evaluate(
        self,
        params_D: Array,
        strategy_ref: Sequence[Any] | None,
        block: Sequence[ClientId],
        client_states: Mapping[ClientId, State],
    ) -> _Reply:
        """Predict for one block; each client with its own model if there is a ``strategy_ref``, as in `fit`."""
        engine, own = self._local(), self._known(strategy_ref[0]) if strategy_ref else None
        engine.client_states = dict(copy_arrays(client_states))
        return _Reply(results=list(engine.evaluate(copy_arrays(params_D), block, own)), memories={})

    def _local(self) -> InProcessEngine:
        if self._engine is None:
            try:
                scenario = self._rebuild()
            except Exception as error:  # as text: not every exception survives the way back
                raise ClusterError(f"{type(error).__name__}: {error}") from error
            trainer = scenario.trainer.batched("auto")
            most = min(1024, max(1, MAX_BLOCK_BYTES // (4 * max(1, trainer.layout.num_parameters))))
            self._engine = InProcessEngine(scenario.data, trainer, block_size=most)
        return self._engine

    def _known(self, ref: Any) -> Strategy:
        if self._strategy[0] != ref:  # the same object from round to round: compiled programs are kept by its parts
            self._strategy = (ref, _library().get(ref))
        strategy: Strategy = self._strategy[1]
        return strategy


class _Reply(NamedTuple):
    """What a worker sends back for a block."""

    results: Sequence[Any]
    memories: Mapping[ClientId, State]


@dataclass(frozen=True, slots=True)
class _Task:
    """A block to be run, and for what."""

    number: int
    block: Sequence[ClientId]
    what: str
    attempt: int = 1

    def again(self, error: _Lost) -> _Task:
        """The same once more, unless it was tried often enough."""
        if self.attempt == MAX_ATTEMPTS:
            raise ClusterError(
                f"{MAX_ATTEMPTS} workers died, one after another, at {error}\n"
                "  try       fewer workers or a smaller engine.block_size, if memory ran out"
            ) from error
        return replace(self, attempt=self.attempt + 1)

    def __str__(self) -> str:
        ids = str(self.block[0]) if len(self.block) == 1 else f"{self.block[0]} to {self.block[-1]}"
        return f"{self.what}, {len(self.block)} client{'s' * (len(self.block) != 1)} ({ids})"


class _Running(NamedTuple):
    """A task that a worker has in hand, until it is due."""

    task: _Task
    worker: Any
    due: float


class _Cluster:
    """A connection to Ray that is quiet, bounded in time, and ends only what it began."""

    def __init__(self, address: str | None, *, cpus: int, timeout: float) -> None:
        self._ray, self._ending = _library(), ExitStack()
        if self._ray.is_initialized():
            free = address is None
            require(free, "address", address, "null: this process is connected to a cluster already", "address=null")
            return
        try:
            with _signals_kept(), warnings.catch_warnings(action="ignore"):
                self._start(cpus) if address is None else self._join(address, timeout)
        except BaseException:
            self.close()
            raise

    def _start(self, cpus: int) -> None:
        """A cluster of this machine's, for as long as this engine lasts."""
        root = tempfile.gettempdir()
        folder = tempfile.TemporaryDirectory(
            prefix="fl-", dir=root if len(root) <= MAX_TEMP_PATH_LENGTH else "/tmp", ignore_cleanup_errors=True
        )
        self._ending.callback(folder.cleanup)
        self._connect("local", num_cpus=cpus, include_dashboard=False, **session_folder(folder.name))

    def _join(self, address: str, timeout: float) -> None:
        """Another's cluster, asked first whether it is there: Ray itself would try for minutes."""
        known = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
        host, _, port = known.rpartition("://")[2].rpartition(":")
        if known != "auto":
            ok = bool(host) and port.isdigit()
            require(ok, "address", address, "auto, or host:port", "address=auto")
            try:
                socket.create_connection((host, int(port)), timeout=min(timeout, CONNECT_TIMEOUT_S)).close()
            except OSError as error:
                raise _no_cluster(address, error) from error
        self._connect(address)

    def _connect(self, address: str, **settings: Any) -> None:
        self._ending.callback(self._ray.shutdown)
        _quieten(self._ending)
        try:
            self._ray.init(address=address, log_to_driver=False, configure_logging=False, **settings)
        except Exception as error:
            raise _no_cluster(address, error) from error

    @property
    def resources(self) -> Mapping[str, float]:
        """What all machines together have."""
        found: Mapping[str, float] = self._ray.cluster_resources()
        return found

    def actor(self, gpus: float) -> Any:
        """What starts workers. Ray does not restart them: it would give up before it knows that a machine is gone."""
        return self._ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")

    def put(self, value: Any, what: str) -> Any:
        """A reference to a value that workers of one machine share."""
        try:
            return self._ray.put(value)
        except (TypeError, AttributeError, ValueError) as error:
            fix = "let it refer to functions and settings, not to open files, locks or generators"
            raise ClusterError(f"{what} cannot be sent to workers: {_first_line(error)}\n  try       {fix}") from error

    def get(self, ref: Any, timeout: float, *, doing: str) -> Any:
        """The value of a reference."""
        try:
            return self._ray.get(ref, timeout=timeout)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause or error
            why = str(cause) if isinstance(cause, FedlearnError) else f"{type(cause).__name__}: {cause}"
            raise ClusterError(f"a worker failed at {doing}: {why}") from error
        except self._ray.exceptions.RayError as error:
            raise _Lost(f"{doing}: {_first_line(error)}") from error

    def wait(self, refs: Sequence[Any], timeout: float, *, count: int = 1) -> Sequence[Any]:
        """Up to ``count`` of the references that are there; fewer if time runs out."""
        ready: Sequence[Any] = self._ray.wait(refs, num_returns=count, timeout=timeout)[0]
        return ready

    def kill(self, worker: Any) -> None:
        """End a worker, busy or not."""
        with suppress(Exception):  # it may be dead already, and so may the cluster
            self._ray.kill(worker)

    def close(self) -> None:
        """Let go of the cluster, and end it if it is ours."""
        with _signals_kept():
            self._ending.close()


def copy_arrays(value: Any) -> Any:
    """A record, mapping or list with all its arrays as NumPy arrays of this process's own.

    What Ray hands over is shared and read-only: a trainer that wrote to it would bring its process down.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: copy_arrays(getattr(value, field.name)) for field in fields_of(value)})
    if isinstance(value, Mapping):
        return {name: copy_arrays(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return getattr(value, "_make", type(value))([copy_arrays(one) for one in value])
    if hasattr(value, "shape") and not isinstance(value, np.generic):
        return np.array(as_numpy(value))
    return value


def _folded(strategy: Strategy, engine: InProcessEngine, results: Sequence[Updates | Failure]) -> Sequence[Any]:
    """One fold for all of a block, where the aggregator can merge folds."""
    if strategy.aggregate.merge is None:
        return results
    gathered = PartialAggregate(aggregator_state=strategy.aggregate.init(strategy.shared_layout(engine.layout)))
    for result in results:
        gathered = accumulate(gathered, strategy.aggregate, result)
    return [gathered]


def _without_memory(result: Updates | Failure) -> Updates | Failure:
    return result if isinstance(result, Failure) else replace(result, client_state={})


def _check(
    trainer: Trainer, num_workers: int | None, gpus_per_worker: float, block_size: int | None, timeout: float
) -> None:
    ok = num_workers is None or is_count(num_workers)
    require(ok, "num_workers", num_workers, "null (all there is room for), or a whole number >= 1", "num_workers=2")
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
    """How many workers the cluster can hold."""
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if not gpus_per_worker:
        return cpus
    return min(cpus, int(gpus // gpus_per_worker) if gpus_per_worker >= 1 else gpus * int(1 / gpus_per_worker))


def _library() -> Any:
    """The ray package, asked not to tell its makers about this run."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as missing:
        raise MissingExtra("engine=ray", "ray") from missing
    verify_version()
    return ray


def _quieten(ending: ExitStack) -> None:
    """Leave the terminal to the run: Ray's log lines go where others' go, its notices about workers nowhere."""
    logger = logging.getLogger("ray")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    ending.enter_context(without_worker_notices())


@contextmanager
def _signals_kept() -> Iterator[None]:
    """What SIGTERM means is for the command line to say: Ray would have it end the process on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _no_cluster(address: str, error: Exception) -> ClusterError:
    where = "on this machine" if address == "local" else f"at engine.address={address}"
    fix = "engine.address=null, which starts one here" if address != "local" else "engine=vector"
    return ClusterError(f"no Ray cluster {where}: {_first_line(error)}\n  try       {fix}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
