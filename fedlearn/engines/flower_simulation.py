"""Flower's own simulation runtime, held open: a thread runs it, and its ServerApp only lends its `Grid`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlearn.errors import FedlearnError
from fedlearn.flower.runtime import redirect_flower_log

POLL_INTERVAL_S = 0.05  # seconds


class SimulationError(FedlearnError):
    """Flower's simulation could not start, or did not answer in time."""


class Simulation:
    """Nodes of Flower's simulation, with its Ray backend. Close it: Flower's threads outlive a program.

    Args:
        app: what each node runs.
        num_nodes: >= 1.
        num_workers: Ray actors of one core each.
        timeout_s: seconds for nodes to reply, the start of Ray included.

    Raises:
        SimulationError: it does not start.
    """

    def __init__(self, app: ClientApp, num_nodes: int, *, num_workers: int, timeout_s: float) -> None:
        self._timeout, self._over, self._grids = timeout_s, Event(), Queue[Grid]()
        self._error: BaseException | None = None
        self._folder = TemporaryDirectory(prefix="fl-", ignore_cleanup_errors=True)
        redirect_flower_log()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray announces that it will change
        init = {"num_cpus": num_workers, "logging_level": "error", "log_to_driver": False}
        backend: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        backend["init_args"] = {**init, "_temp_dir": self._folder.name}
        self._thread = Thread(target=self._run, args=(app, num_nodes, backend), daemon=True)
        self._thread.start()
        try:
            self._grid = self._first_grid()
        except BaseException:
            self.close()
            raise

    def node_ids(self) -> list[int]:
        """Flower's ids of all nodes."""
        return list(self._grid.get_node_ids())

    def exchange(self, message_type: str, contents: Mapping[int, RecordDict]) -> dict[int, Message]:
        """What each node replies, which may be an error.

        Raises:
            SimulationError: Flower has ended, or a node did not reply in time.
        """
        ends, later = time.monotonic() + self._timeout, 2 * self._timeout + 60  # our own end says more
        sent = [Message(content, node, message_type, ttl=later) for node, content in contents.items()]
        waiting = dict(zip(self._grid.push_messages(sent), contents, strict=True))
        found: dict[int, Message] = {}
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                found[waiting.pop(reply.metadata.reply_to_message_id)] = reply
            if waiting:
                self._pause(ends, f"{len(waiting)} of {len(contents)} nodes have not answered")
        return found

    def close(self) -> None:
        """Let the ServerApp return, which ends the simulation and Ray; harmless when called twice."""
        self._over.set()
        self._thread.join(timeout=30)
        self._folder.cleanup()

    def _run(self, app: ClientApp, num_nodes: int, backend: Any) -> None:
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            self._grids.put(grid)
            self._over.wait()

        try:
            from flwr.simulation import run_simulation

            run_simulation(server, app, num_nodes, backend_config=backend)
        except BaseException as error:
            self._error = error

    def _first_grid(self) -> Grid:
        ends = time.monotonic() + self._timeout
        while True:
            with suppress(Empty):
                return self._grids.get(timeout=POLL_INTERVAL_S)
            self._pause(ends, "it has not started")

    def _pause(self, ends: float, what: str) -> None:
        """Sleep a moment, unless there is nothing to wait for any more."""
        if not self._thread.is_alive():
            cause = self._error and (self._error.__cause__ or self._error)
            raise SimulationError(f"Flower's simulation has ended: {type(cause).__name__}: {cause}") from self._error
        if time.monotonic() > ends:
            fix = f"engine.timeout={10 * self._timeout:g}"
            raise SimulationError(f"Flower's simulation: {what} in {self._timeout:g} s\n  try       {fix}")
        time.sleep(POLL_INTERVAL_S)
