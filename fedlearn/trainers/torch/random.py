"""Seed and restore torch's global random generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator for a block of code, then restore its state.

    A module that is built in the block has the same initial weights in every process.

    Args:
        seed: seed of the run, >= 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def restored_generators(device: torch.device | str) -> Iterator[None]:
    """Restore the state of torch's global generators after a block of code.

    Args:
        device: device whose generator the block uses, besides the generator of the CPU.
    """
    kind = torch.device(device).type
    options = {"devices": []} if kind == "cpu" else {"devices": [device], "device_type": kind}
    with torch.random.fork_rng(**options):
        yield
