"""Connect to a Ray cluster, and define the workers that run there.

Shapes: K clients in a block, D parameters.

A cluster of this process has a temporary folder, which is removed at the end. A cluster that was running before keeps
running. Log lines and notices of Ray do not appear in the terminal.
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
from fedlearn.engines.base import InProcessEngine, automatic_block_size
from fedlearn.engines.ray.compat import import_path_of_workers, session_folder, verify_version, without_worker_notices
from fedlearn.errors import FedlearnError, MissingExtra, require

CONNECT_TIMEOUT_S = 5.0  # seconds to connect to the port of a cluster
MAX_TEMP_PATH_LENGTH = 32  # characters; the paths of Ray's sockets, which are longer, may have 107 characters


class ClusterError(FedlearnError):
    """Report a cluster that is unreachable, a worker that failed, or a worker that exceeded its time limit."""


class WorkerDied(ClusterError):
    """Report a worker process that ended before it completed its task."""


class Cluster:
    """A connection to a Ray cluster.

    Ray prints nothing to the terminal. Each call has a time limit. `close` ends only processes of this connection.

    Args:
        address: ``auto`` or ``host:port``; None: a new cluster on this machine, or the present connection.
        cpus: number of cores of a new cluster, >= 1.
        timeout: seconds to connect to ``address``, > 0.

    Raises:
        SettingError: The address is invalid, or this process is already connected to a cluster.
        ClusterError: No cluster is at this address.
    """

    def __init__(self, address: str | None, *, cpus: int, timeout: float) -> None:
        self._ray, self._cleanup = load_ray(), ExitStack()
        if self._ray.is_initialized():
            expected = "null, because this process is already connected to a cluster"
            require(address is None, "address", address, expected, "address=null")
            return
        try:
            with _signals_kept(), warnings.catch_warnings(action="ignore"):
                self._start(cpus) if address is None else self._join(address, timeout)
        except BaseException:
            self.close()
            raise

    def _start(self, cpus: int) -> None:
        """Start a cluster on this machine, which `close` ends."""
        root = tempfile.gettempdir()
        folder = tempfile.TemporaryDirectory(
            prefix="fl-", dir=root if len(root) <= MAX_TEMP_PATH_LENGTH else "/tmp", ignore_cleanup_errors=True
        )
        self._cleanup.callback(folder.cleanup)
        self._connect("local", num_cpus=cpus, include_dashboard=False, **session_folder(folder.name))

    def _join(self, address: str, timeout: float) -> None:
        """Connect to a running cluster; probe its port first, because Ray would retry for minutes."""
        known = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
        host, _, port = known.rpartition("://")[2].rpartition(":")
        if known != "auto":
            is_valid = bool(host) and port.isdigit()
            require(is_valid, "address", address, "auto, or host:port", "address=auto")
            try:
                socket.create_connection((host, int(port)), timeout=min(timeout, CONNECT_TIMEOUT_S)).close()
            except OSError as error:
                raise _no_cluster(address, error) from error
        self._connect(address)

    def _connect(self, address: str, **settings: Any) -> None:
        self._cleanup.callback(self._ray.shutdown)
        _silence_ray(self._cleanup)
        try:
            with import_path_of_workers() as worker_settings:
                self._ray.init(
                    address=address, log_to_driver=False, configure_logging=False, **settings, **worker_settings
                )
        except Exception as error:
            raise _no_cluster(address, error) from error

    @property
    def resources(self) -> Mapping[str, float]:
        """Resources of all machines together: name, e.g. ``CPU`` or ``GPU`` -> number."""
        resources: Mapping[str, float] = self._ray.cluster_resources()
        return resources

    def actor(self, gpus: float) -> Any:
        """Return the actor class of workers. `fedlearn.engines.ray.engine` replaces dead workers, not Ray."""
        return self._ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")

    def put(self, value: Any, label: str) -> Any:
        """Return a reference to a value; all workers of a machine share one copy. ``label`` names it in errors."""
        try:
            return self._ray.put(value)
        except (TypeError, AttributeError, ValueError) as error:
            fix = "a value without open files, locks and generators"
            raise ClusterError(f"{label} cannot be sent to workers: {_first_line(error)}\n  advice    {fix}") from error

    def get(self, ref: Any, timeout: float, *, doing: str) -> Any:
        """Return the value of a reference.

        Args:
            ref: reference to the result of a task.
            timeout: seconds to wait.
            doing: name of the task, for errors.

        Raises:
            WorkerDied: The worker process has ended.
            ClusterError: The worker raised an error.
        """
        try:
            return self._ray.get(ref, timeout=timeout)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause or error
            reason = str(cause) if isinstance(cause, FedlearnError) else f"{type(cause).__name__}: {cause}"
            raise ClusterError(f"a worker failed at {doing}: {reason}") from error
        except self._ray.exceptions.RayError as error:
            raise WorkerDied(f"{doing}: {_first_line(error)}") from error

    def wait(self, refs: Sequence[Any], timeout: float, *, count: int = 1) -> Sequence[Any]:
        """Return up to ``count`` references whose values are available; fewer after ``timeout`` seconds."""
        ready: Sequence[Any] = self._ray.wait(refs, num_returns=count, timeout=timeout)[0]
        return ready

    def kill(self, worker: Any) -> None:
        """End a worker, busy or idle."""
        with suppress(Exception):  # the worker or the cluster may already be dead
            self._ray.kill(worker)

    def close(self) -> None:
        """Close the connection; end the cluster if this connection started it."""
        with _signals_kept():
            self._cleanup.close()


class Worker:
    """A process of the cluster. It keeps the scenario; a round does not depend on its memory.

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
        client_models: Mapping[ClientId, Array],
    ) -> WorkerResponse:
        """Train one block.

        Args:
            request: the request without the models of single clients.
            strategy_ref: reference to the strategy, which the worker fetches once.
            block: ids of the clients.
            client_states: states of these clients.
            client_models: models of these clients, see `Request.client_models`.
        """
        engine, strategy = self._local(), self._known(strategy_ref[0])
        engine.client_states = dict(copy_arrays(client_states))
        request = replace(request, client_models=client_models)
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
        """Return the predictions for one block, with ``strategy_ref`` of the personal model of each client."""
        engine, strategy = self._local(), self._known(strategy_ref[0]) if strategy_ref else None
        engine.client_states = dict(copy_arrays(client_states))
        return WorkerResponse(results=list(engine.evaluate(copy_arrays(params_D), block, strategy)), client_states={})

    def _local(self) -> InProcessEngine:
        if self._engine is None:
            try:
                scenario = self._rebuild()
            except Exception as error:  # sent as text, because Ray cannot pickle every exception
                raise ClusterError(f"{type(error).__name__}: {error}") from error
            trainer = scenario.trainer.with_batching("auto")
            self._engine = InProcessEngine(scenario.data, trainer, block_size=automatic_block_size(trainer))
        return self._engine

    def _known(self, ref: Any) -> Strategy:
        if self._strategy[0] != ref:  # keep the same object, because its parts are keys for compiled programs
            self._strategy = (ref, load_ray().get(ref))
        strategy: Strategy = self._strategy[1]
        return strategy


@dataclass(frozen=True, slots=True)
class WorkerResponse:
    """The result of one block of clients.

    Attributes:
        results: updates, failures, predictions, or one partial aggregate of the whole block.
        client_states: the new state of each client of the block.
    """

    results: Sequence[Any]
    client_states: Mapping[ClientId, State]


def copy_arrays(value: Any) -> Any:
    """Return a record, mapping or list with copies of all its arrays, as writable NumPy arrays.

    Arrays from Ray are shared and read-only. A trainer that writes to them would crash its process.
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
    aggregate = PartialAggregate(aggregator_state=strategy.aggregate.init(strategy.shared_layout(engine.layout)))
    for result in results:
        aggregate = accumulate(aggregate, strategy.aggregate, result)
    return [aggregate]


def _without_state(result: Updates | Failure) -> Updates | Failure:
    return result if isinstance(result, Failure) else replace(result, client_state={})


def load_ray() -> Any:
    """Import ray without its usage statistics, and return the module."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as missing:
        raise MissingExtra("engine=ray", "ray") from missing
    verify_version()
    return ray


def _silence_ray(cleanup: ExitStack) -> None:
    """Send Ray's log lines to the root logger instead of the terminal, and drop its notices about workers."""
    logger = logging.getLogger("ray")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    cleanup.enter_context(without_worker_notices())


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM, because Ray installs a handler that ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _no_cluster(address: str, error: Exception) -> ClusterError:
    where = "on this machine" if address == "local" else f"at engine.address={address}"
    fix = "engine.address=null" if address != "local" else "engine=vector"
    return ClusterError(f"no Ray cluster {where}: {_first_line(error)}\n  try       {fix}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
