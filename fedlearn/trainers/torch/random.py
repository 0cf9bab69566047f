"""Seed torch's global random generator, which draws the initial weights of a new module."""

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
