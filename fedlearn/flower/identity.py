"""Who speaks: Flower makes a message only in a process that has been told which run and node it is."""

from __future__ import annotations

from flwr.supercore.task_identity import TaskIdentity

SERVER = 1  # Flower's number for the node on which a ServerApp runs


def be_server() -> None:
    """Let this process make messages as a server, unless Flower has told it who it is."""
    try:
        _ = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    except RuntimeError:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER, 1
