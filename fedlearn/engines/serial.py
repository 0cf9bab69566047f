"""The debugger's engine: one client after another, in this process; breakpoints work."""

from __future__ import annotations

from fedlearn.data.federated import FederatedData
from fedlearn.engines.base import LocalEngine
from fedlearn.trainers.base import Trainer


def serial(data: FederatedData, trainer: Trainer) -> LocalEngine:
    """One client at a time."""
    return LocalEngine(data, trainer, block_size=1)
