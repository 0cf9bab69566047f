"""Test whether the processes of a coordinator work, from their parent process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.coordinator_side.connections import write_connections
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient
from fedlearn.deploy.coordinator_side.run_recovery import PROCESSES_FILE

PROBE_INTERVAL_S = 1.5  # seconds between two requests to the SuperLink
MAX_AGE_S = 10.0  # seconds without an answer or a poll


class LinkProbe(threading.Thread):
    """Ask the SuperLink for the nodes at intervals. The request passes TLS, the check of persons, and the database.

    Args:
        connect: function that returns a connection to the coordinator.
        state: state folder of the coordinator, for the connections of the nodes.
        started_at: function that returns the start of the SuperLink, as a Unix time.
    """

    def __init__(
        self, connect: Callable[[], CoordinatorClient], state: Path, started_at: Callable[[], float] = lambda: 0.0
    ) -> None:
        super().__init__(daemon=True, name="probe of the SuperLink")
        self._connect, self.state, self._started_at = connect, state, started_at
        self._answered_at, self._problem = time.monotonic(), ""

    def run(self) -> None:
        """Repeat the request until the process ends."""
        control = self._connect()
        while True:
            try:
                started_at = self._started_at()  # before the request, which a later SuperLink may answer
                write_connections(self.state, control.node_states(), link_started_at=started_at)
                self._answered_at, self._problem = time.monotonic(), ""
            except (ConnectionProblem, OSError) as error:
                self._problem = str(error).splitlines()[0]
            time.sleep(PROBE_INTERVAL_S)

    def problem(self) -> str:
        """Return the problem of the SuperLink; empty if it has answered within `MAX_AGE_S`."""
        age = time.monotonic() - self._answered_at
        if age < MAX_AGE_S:
            return self._problem
        return self._problem or f"it has not answered for {age:.0f} s"


def executor_problem(state: Path, link: LinkProbe) -> str:
    """Return the problem of the SuperExec; empty if it polls, or if the SuperLink does not answer its polls."""
    if link.problem():
        return ""
    try:
        age = time.time() - (state / PROCESSES_FILE).stat().st_mtime
    except OSError:
        return "it has not started yet"
    return "" if age < MAX_AGE_S else f"it has not asked for runs for {age:.0f} s"
