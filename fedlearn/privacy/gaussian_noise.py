"""Gaussian noise on updates: from the operating system's generator where clients are real, from the seed in simulation.

Shapes: K clients in a block, D numbers of an update.

What floating point costs: noise is drawn in float64 by Box and Muller from 53 random bits, so that no draw lies beyond
8.6 standard deviations (a Gaussian's lies there with probability 1e-17); sums are then rounded to multiples of a power
of two that is at most 2^-20 standard deviations, because the gaps between the floating point numbers a sampler can
return give away what was added (Mironov, CCS 2012). Grid and tail are far below any delta in use, but they make the
guarantee one of arithmetic that is nearly, not exactly, that of real numbers.
"""

from __future__ import annotations

from math import floor, log2

import numpy as np

from fedlearn.algorithm.transforms import Context
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.random import Purpose, generator, secret_normals
from fedlearn.core.records import Array

GRID_BITS = 20  # bits


def standard_normals(shape: tuple[int, ...], context: Context, *, client: int | None = None) -> np.ndarray:
    """Return standard normal numbers, float64.

    Args:
        shape: how many.
        context: says whether clients are real. If so the numbers come from the operating system's cryptographic
            generator and nothing can repeat them; if not they follow from seed, round and client, so that a run that
            is resumed adds the noise that it would have added.
        client: whose noise; None for the server's.
    """
    if context.deployed:
        return secret_normals(shape)
    rng = generator(context.seed, Purpose.NOISE, round=context.round, client=0 if client is None else client + 1)
    return rng.standard_normal(shape)


def add_gaussian_noise(update: Array, noise: np.ndarray, std: float) -> Array:
    """Return ``update + std * noise``, summed in float64 and rounded to the grid, in library and precision of
    ``update``.
    """
    exact = as_numpy(update).astype(np.float64) + std * noise
    return asarray_like(round_to_grid(exact, std).astype(np.float32), update)


def round_to_grid(values: np.ndarray, std: float) -> np.ndarray:
    """The nearest multiples of the largest power of two that is at most ``std * 2^-20``.

    >>> round_to_grid(np.array([0.3]), 1.0) * 2**20
    array([314573.])
    """
    step = 2.0 ** (floor(log2(std)) - GRID_BITS)
    return np.round(values / step) * step
