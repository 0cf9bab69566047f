"""The engine for speed: blocks of clients, each handed to the trainer as one piece of work."""

from __future__ import annotations

import sys

from fedlearn.data.federated import FederatedData
from fedlearn.engines.base import LocalEngine
from fedlearn.engines.workers import Workers
from fedlearn.errors import is_count, require
from fedlearn.trainers.base import Trainer, available_cores

BATCHINGS = ("auto", "map", "vmap", "workers")
MIXED = 31  # clients in a block of orders of different ages: few enough for ``auto`` to train them exactly as alone
BLOCK_BYTES = 512 * 2**20  # of updates held at once when the size is chosen automatically


def vector(
    data: FederatedData, trainer: Trainer, *, block_size: int | None = None, batching: str = "auto"
) -> LocalEngine:
    """Blocks of clients at a time.

    Args:
        data: examples by client.
        trainer: of the model.
        block_size: clients in a block, >= 1; None takes as many as keep their updates within 512 MiB, at most 1024.
        batching: how a block is trained. ``map``: one client after another (JAX: inside one program for each core).
            ``vmap``: all clients step together, as one batch of models. ``workers``: processes, one a core, for torch
            on the CPU of a Linux machine. ``auto``: what suits device, model and block; the header says what.

    *Guarantees*: results do not depend on ``block_size``, nor on ``batching`` by more than 1e-5 after 20 rounds. In
    torch ``map`` and ``workers`` are bit-identical to the serial engine, and so is ``auto`` for blocks of less than
    32 clients or models of more than 20,000 parameters. Under an asynchronous strategy ``auto`` on a CPU keeps blocks
    below that, as what is under way together is not the same after a stop; ``vmap`` there repeats to rounding.

    Raises:
        SettingError: a setting is out of range, or the trainer cannot be batched so.
    """
    ok = block_size is None or is_count(block_size)
    require(ok, "block_size", block_size, "null (automatic), or a whole number >= 1", "block_size=null")
    require(batching in BATCHINGS, "batching", batching, f"one of {', '.join(BATCHINGS)}", "batching=auto")
    can_fork = trainer.framework == "torch" and trainer.device == "cpu" and sys.platform == "linux"
    require(can_fork or batching != "workers", "batching", batching, "workers for torch on a CPU", "batching=auto")
    made = trainer.batched("map" if batching == "workers" else batching)
    safe = can_fork and available_cores() > 1 and "jax" not in sys.modules  # whose threads do not survive a fork
    if batching == "workers" or (batching == "auto" and safe):
        made = Workers(made, data, num_workers=max(2, available_cores()), auto=batching == "auto")
    automatic = min(1024, max(1, BLOCK_BYTES // (4 * max(1, trainer.layout.num_parameters))))
    exactly = batching == "auto" and trainer.device == "cpu"
    return LocalEngine(data, made, block_size=block_size or automatic, mixed_size=MIXED if exactly else None)
