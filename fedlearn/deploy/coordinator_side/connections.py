"""Write the start of each node's connection to a file, from which the processes of runs read it.

A message that a node received over an earlier connection may be lost. So may a response that an earlier SuperLink
received. So a run sends its request again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from fedlearn.core.checkpoint import write_atomically
from fedlearn.deploy.coordinator_side.control_api import NodeState

CONNECTIONS_FILE = "connections.json"  # in the state folder of the coordinator


def write_connections(state: Path, nodes: list[NodeState], *, link_started_at: float = 0.0) -> None:
    """Write the start of the connection of each node. No connection is older than the SuperLink.

    Args:
        state: state folder of the coordinator.
        nodes: states of all nodes.
        link_started_at: start of the SuperLink, as a Unix time.
    """
    times = dict[str, float]()
    for node in nodes:
        if node.state == "online":
            with suppress(ValueError):
                since = datetime.fromisoformat(node.since).timestamp()
                times[str(node.id)] = max(since, link_started_at)
    write_atomically(state / CONNECTIONS_FILE, json.dumps(times))


def connections_of(state: Path) -> Callable[[], Mapping[int, float]]:
    """Return a function that reads the start of each connection, as a Unix time by the id of the node."""

    def read() -> Mapping[int, float]:
        try:
            content = json.loads((state / CONNECTIONS_FILE).read_text(encoding="utf-8"))
            return {int(node_id): float(since) for node_id, since in content.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    return read
