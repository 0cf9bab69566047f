"""Redirect the log lines of Flower in this process."""

from __future__ import annotations

import logging


def redirect_flower_log() -> None:
    """Send the log lines of Flower to the root logger, and so to ``run.log`` of a run."""
    logger = logging.getLogger("flwr")
    logger.handlers.clear()
    logger.propagate = True
