"""The connection to a Ray cluster, and the workers that run there.

Shapes: K clients in a block, D parameters.

A cluster that this process starts has its own temporary folder, which is removed at the end. A cluster that was running
before keeps running. Log lines and notices of Ray stay away from the terminal.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, is_dataclass, replace
from dataclasses import fields as fields_of
from typing import Any

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate, accumulate
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import Array, ClientId, Failure, Request, State, Updates
from fedlearn.engines.base import MAX_BLOCK_BYTES, InProcessEngine
from fedlearn.engines.ray.compat import import_path_of_workers, session_folder, verify_version, without_worker_notices
from fedlearn.errors import FedlearnError, MissingExtra, require

CONNECT_TIMEOUT_S = 5.0  # seconds for a cluster to answer at all
MAX_TEMP_PATH_LENGTH = 32  # characters; leaves room for the names of Ray's sockets, which may have 107


class ClusterError(FedlearnError):
    """The cluster cannot be reached, a worker fails, or a worker exceeds its time limit."""


class WorkerDied(ClusterError):
    """A worker process has ended before its task was done."""


class Cluster:
    """A connection to Ray that is quiet, bounded in time, and ends only processes that it started."""

    def __init__(self, address: str | None, *, cpus: int, timeout: float) -> None:
        self._ray, self._ending = load_ray(), ExitStack()
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
        """Start a cluster on this machine, until `close`."""
        root = tempfile.gettempdir()
        folder = tempfile.TemporaryDirectory(
            prefix="fl-", dir=root if len(root) <= MAX_TEMP_PATH_LENGTH else "/tmp", ignore_cleanup_errors=True
        )
        self._ending.callback(folder.cleanup)
        self._connect("local", num_cpus=cpus, include_dashboard=False, **session_folder(folder.name))

    def _join(self, address: str, timeout: float) -> None:
        """Connect to a running cluster; probe its port first, because Ray would retry for minutes."""
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
            with import_path_of_workers() as more:
                self._ray.init(address=address, log_to_driver=False, configure_logging=False, **settings, **more)
        except Exception as error:
            raise _no_cluster(address, error) from error

    @property
    def resources(self) -> Mapping[str, float]:
        """The CPUs, GPUs and other resources of all machines together."""
        found: Mapping[str, float] = self._ray.cluster_resources()
        return found

    def actor(self, gpus: float) -> Any:
        """Return the actor class of workers; Ray does not restart them, see `fedlearn.engines.ray.engine`."""
        return self._ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")

    def put(self, value: Any, label: str) -> Any:
        """Return a reference to a value; all workers of a machine share one copy. ``label`` names it in errors."""
        try:
            return self._ray.put(value)
        except (TypeError, AttributeError, ValueError) as error:
            fix = "let it refer to functions and settings, not to open files, locks or generators"
            raise ClusterError(f"{label} cannot be sent to workers: {_first_line(error)}\n  try       {fix}") from error

    def get(self, ref: Any, timeout: float, *, doing: str) -> Any:
        """Return the value of a reference.

        Raises:
            WorkerDied: the worker process has ended.
            ClusterError: the worker raised an error.
        """
        try:
            return self._ray.get(ref, timeout=timeout)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause or error
            why = str(cause) if isinstance(cause, FedlearnError) else f"{type(cause).__name__}: {cause}"
            raise ClusterError(f"a worker failed at {doing}: {why}") from error
        except self._ray.exceptions.RayError as error:
            raise WorkerDied(f"{doing}: {_first_line(error)}") from error

    def wait(self, refs: Sequence[Any], timeout: float, *, count: int = 1) -> Sequence[Any]:
        """Return up to ``count`` references whose values are available; fewer after ``timeout`` seconds."""
        ready: Sequence[Any] = self._ray.wait(refs, num_returns=count, timeout=timeout)[0]
        return ready

    def kill(self, worker: Any) -> None:
        """End a worker, busy or idle."""
        with suppress(Exception):  # it may be dead already, and so may the cluster
            self._ray.kill(worker)

    def close(self) -> None:
        """Close the connection; end the cluster if this connection started it."""
        with _signals_kept():
            self._ending.close()


class Worker:
    """One process of the cluster. It keeps the scenario, and nothing that a round depends on.

    Args:
        rebuild: function that builds the scenario.
    """

    def __init__(self, rebuild: Callable[[], Any]) -> None:
        self._rebuild = rebuild
        self._engine: InProcessEngine | None = None
        self._strategy: tuple[Any, Any] = (None, None)

    def ready(self) -> tuple[str, int]:
        """Build the scenario; return the digest of its layout, and the process id."""
        return self._local().layout.digest, os.getpid()

    def fit(
        self,
        request: Request,
        strategy_ref: Sequence[Any],
        block: Sequence[ClientId],
        client_states: Mapping[ClientId, State],
    ) -> WorkerResponse:
        """Train one block; ``strategy_ref`` holds a reference to the strategy, which is fetched once."""
        engine, strategy = self._local(), self._known(strategy_ref[0])
        engine.client_states = dict(copy_arrays(client_states))
        results: Sequence[Any] = [
            _without_state(result) for result in engine.fit(copy_arrays(request), strategy, block)
        ]
        results = copy_arrays(_merged(strategy, engine, results))
        return WorkerResponse(results=results, client_states=engine.client_states)

    def evaluate(
        self,
        params_D: Array,
        strategy_ref: Sequence[Any] | None,
        block: Sequence[ClientId],
        client_states: Mapping[ClientId, State],
    ) -> WorkerResponse:
        """Return the predictions for one block; with ``strategy_ref``, each client uses its personal model."""
        engine, strategy = self._local(), self._known(strategy_ref[0]) if strategy_ref else None
        engine.client_states = dict(copy_arrays(client_states))
        return WorkerResponse(results=list(engine.evaluate(copy_arrays(params_D), block, strategy)), client_states={})

    def _local(self) -> InProcessEngine:
        if self._engine is None:
            try:
                scenario = self._rebuild()
            except Exception as error:  # as text: Ray cannot send every exception back
                raise ClusterError(f"{type(error).__name__}: {error}") from error
            trainer = scenario.trainer.with_batching("auto")
            most = min(1024, max(1, MAX_BLOCK_BYTES // (4 * max(1, trainer.layout.num_parameters))))
            self._engine = InProcessEngine(scenario.data, trainer, block_size=most)
        return self._engine

    def _known(self, ref: Any) -> Strategy:
        if self._strategy[0] != ref:  # keep the same object: compiled programs are cached by its parts
            self._strategy = (ref, load_ray().get(ref))
        strategy: Strategy = self._strategy[1]
        return strategy


@dataclass(frozen=True, slots=True)
class WorkerResponse:
    """The result of one block.

    Attributes:
        results: updates, failures, predictions, or one partial aggregate of the whole block.
        client_states: the new state of each client of the block.
    """

    results: Sequence[Any]
    client_states: Mapping[ClientId, State]


def copy_arrays(value: Any) -> Any:
    """Return a record, mapping or list with copies of all its arrays, as writable NumPy arrays.

    Arrays from Ray are shared and read-only: a trainer that writes to them would end its process.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: copy_arrays(getattr(value, field.name)) for field in fields_of(value)})
    if isinstance(value, Mapping):
        return {name: copy_arrays(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return getattr(value, "_make", type(value))([copy_arrays(item) for item in value])
    if hasattr(value, "shape") and not isinstance(value, np.generic):
        return np.array(as_numpy(value))
    return value


def _merged(strategy: Strategy, engine: InProcessEngine, results: Sequence[Updates | Failure]) -> Sequence[Any]:
    """Return one partial aggregate of the block if the strategy supports it, else the results."""
    if not strategy.supports_partial_aggregates:
        return results
    gathered = PartialAggregate(aggregator_state=strategy.aggregate.init(strategy.shared_layout(engine.layout)))
    for result in results:
        gathered = accumulate(gathered, strategy.aggregate, result)
    return [gathered]


def _without_state(result: Updates | Failure) -> Updates | Failure:
    return result if isinstance(result, Failure) else replace(result, client_state={})


def load_ray() -> Any:
    """Import ray, with its usage statistics switched off."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as missing:
        raise MissingExtra("engine=ray", "ray") from missing
    verify_version()
    return ray


def _quieten(ending: ExitStack) -> None:
    """Keep Ray off the terminal: send its log lines to the root logger, and drop its notices about workers."""
    logger = logging.getLogger("ray")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    ending.enter_context(without_worker_notices())


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM: Ray replaces it with one that ends the process at once."""
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
