"""Keep Flower's simulation runtime open in a thread. Its ServerApp only provides its `Grid`."""

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

POLL_INTERVAL_S = 0.05  # seconds between two polls


class SimulationError(FedlearnError):
    """Report a simulation of Flower that cannot start, has ended, or does not respond in time."""


class Simulation:
    """Run the nodes of Flower's simulation with its Ray backend. Call `close` to end Flower's threads.

    Args:
        app: app that each node runs.
        num_nodes: number of nodes, >= 1.
        num_workers: number of Ray actors of one core each, >= 1.
        timeout_s: seconds for the nodes to respond, the start of Ray included, > 0.

    Raises:
        SimulationError: The simulation does not start.
    """

    def __init__(self, app: ClientApp, num_nodes: int, *, num_workers: int, timeout_s: float) -> None:
        self._timeout_s, self._closed, self._grids = timeout_s, Event(), Queue[Grid]()
        self._error: BaseException | None = None
        self._folder = TemporaryDirectory(prefix="fl-", ignore_cleanup_errors=True)
        redirect_flower_log()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault(
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
        )  # otherwise Ray prints a notice about a future change
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
        """Return Flower's ids of all nodes."""
        return list(self._grid.get_node_ids())

    def exchange(self, message_type: str, contents: Mapping[int, RecordDict]) -> dict[int, Message]:
        """Send a message to each node and return the responses, which may be errors of Flower.

        Args:
            message_type: Flower's type of the message, e.g. ``train``.
            contents: node id -> content of the message.

        Raises:
            SimulationError: Flower has ended, or a node did not respond in time.
        """
        deadline = time.monotonic() + self._timeout_s
        ttl = 2 * self._timeout_s + 60  # longer than the deadline, because our error has more information
        messages = [Message(content, node, message_type, ttl=ttl) for node, content in contents.items()]
        waiting = dict(zip(self._grid.push_messages(messages), contents, strict=True))
        responses: dict[int, Message] = {}
        while waiting:
            for response in self._grid.pull_messages(list(waiting)):
                responses[waiting.pop(response.metadata.reply_to_message_id)] = response
            if waiting:
                self._pause(deadline, f"{len(waiting)} of {len(contents)} nodes have not responded")
        return responses

    def close(self) -> None:
        """End the simulation and Ray; a second call has no effect."""
        self._closed.set()
        self._thread.join(timeout=30)
        self._folder.cleanup()

    def _run(self, app: ClientApp, num_nodes: int, backend: Any) -> None:
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            self._grids.put(grid)
            self._closed.wait()

        try:
            from flwr.simulation import run_simulation

            run_simulation(server, app, num_nodes, backend_config=backend)
        except BaseException as error:
            self._error = error

    def _first_grid(self) -> Grid:
        deadline = time.monotonic() + self._timeout_s
        while True:
            with suppress(Empty):
                return self._grids.get(timeout=POLL_INTERVAL_S)
            self._pause(deadline, "it has not started")

    def _pause(self, deadline: float, problem: str) -> None:
        """Wait for one poll interval.

        Raises:
            SimulationError: The simulation has ended, or the deadline has passed.
        """
        if not self._thread.is_alive():
            cause = self._error and (self._error.__cause__ or self._error)
            raise SimulationError(f"Flower's simulation has ended: {type(cause).__name__}: {cause}") from self._error
        if time.monotonic() > deadline:
            fix = f"engine.timeout={10 * self._timeout_s:g}"
            raise SimulationError(f"Flower's simulation: {problem} in {self._timeout_s:g} s\n  try       {fix}")
        time.sleep(POLL_INTERVAL_S)
