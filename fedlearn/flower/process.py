"""How this process gets along with Flower: who it is, and where Flower's log lines go."""

from __future__ import annotations

import logging

from flwr.supercore.task_identity import TaskIdentity

SERVER = 1  # Flower's number for the node on which a ServerApp runs


def be_server() -> None:
    """Let this process make messages as a server, unless Flower has told it who it is."""
    try:
        _ = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    except RuntimeError:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER, 1


def leave_the_terminal() -> None:
    """Flower's log lines go where others' go, a run's ``run.log``."""
    logger = logging.getLogger("flwr")
    logger.handlers.clear()
    logger.propagate = True
