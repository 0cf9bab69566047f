"""Log lines of Flower in this process."""

from __future__ import annotations

import logging


def redirect_flower_log() -> None:
    """Flower's log lines go where others' go, a run's ``run.log``."""
    logger = logging.getLogger("flwr")
    logger.handlers.clear()
    logger.propagate = True
