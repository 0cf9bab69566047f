"""The engine for speed: blocks of clients, each handed to the trainer as one piece of work."""

from __future__ import annotations

from fedlearn.data.federated import FederatedData
from fedlearn.engines.base import LocalEngine
from fedlearn.errors import is_count, require
from fedlearn.trainers.base import Trainer

BLOCK_BYTES = 512 * 2**20  # of updates held at once when the size is chosen automatically


def vector(data: FederatedData, trainer: Trainer, *, block_size: int | None = None) -> LocalEngine:
    """Blocks of ``block_size`` clients; None chooses as many as keep their updates within 512 MiB, at most 1024."""
    ok = block_size is None or is_count(block_size)
    require(ok, "block_size", block_size, "null (automatic), or a whole number >= 1", "block_size=null")
    automatic = min(1024, max(1, BLOCK_BYTES // (4 * max(1, trainer.layout.num_parameters))))
    return LocalEngine(data, trainer, block_size=block_size or automatic)
