"""Random numbers from the seed, split by round, client and purpose, and from the operating system.

Streams of the seed can be repeated. Numbers from the operating system's cryptographic generator cannot.
"""

from __future__ import annotations

import os
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Purposes of random streams. Their values are stable, because checkpoints depend on them."""

    INIT = 0
    SELECT = 1
    BATCHES = 2
    MODEL = 3
    PARTITION = 4
    SPLIT = 5
    EVALUATE = 7
    NOISE = 8
    MASKS = 9
    CANARIES = 10
    SHADOWS = 11
    MIXING = 20
    POISONING = 21
    COMPRESS = 22
    FEATURE_NOISE = 23
    STATISTICS = 24
    AUGMENT = 25
    ROOT = 26
    STEPS = 27
    SYSTEM = 30
    DEVICE = 31
    INTERVALS = 40
    PERMUTATION = 41


def seed_sequence(seed: int, purpose: Purpose, *, round: int = 0, client: int = 0) -> np.random.SeedSequence:
    """Return the seed sequence of one stream. Equal arguments give equal streams on all machines."""
    return np.random.SeedSequence((seed, round, client, int(purpose)))


def generator(seed: int, purpose: Purpose, *, round: int = 0, client: int = 0) -> np.random.Generator:
    """Return a NumPy generator for one purpose.

    >>> a, b = (generator(1, Purpose.BATCHES, round=3, client=7) for _ in range(2))
    >>> bool(a.integers(100) == b.integers(100))
    True
    """
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, round=round, client=client)))


def integer_seed(seed: int, purpose: Purpose, *, round: int = 0, client: int = 0) -> int:
    """Return a 63-bit seed for the generator of a framework."""
    high, low = seed_sequence(seed, purpose, round=round, client=client).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def secret_uniforms(shape: tuple[int, ...]) -> np.ndarray:
    """Return secret uniform numbers in [0, 1), float64, multiples of 2^-53."""
    bits = np.frombuffer(os.urandom(8 * int(np.prod(shape))), np.uint64)
    return (bits >> np.uint64(11)).reshape(shape) * 2.0**-53


def secret_normals(shape: tuple[int, ...]) -> np.ndarray:
    """Return secret standard normal numbers, float64, by the method of Box and Muller.

    No number exceeds 8.7 standard deviations.
    """
    count = int(np.prod(shape))
    radius, angle = secret_uniforms((2, (count + 1) // 2))
    radius, angle = np.sqrt(-2 * np.log(radius + 2.0**-54)), 2 * np.pi * angle
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(shape)
