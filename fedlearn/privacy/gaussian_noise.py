"""Gaussian noise on updates, from the operating system's generator in deployment, and from the seed in simulations.

Shapes: K clients in a block, D numbers of an update.

The noise is drawn in float64 by the method of Box and Muller from 53 random bits. So no draw is beyond 8.6 standard
deviations; a Gaussian variable exceeds this with probability 1e-17. Sums are rounded to a grid
(`fedlearn.core.noise_grid`). Both effects are far below any delta in use. Still, the guarantee holds for arithmetic
that is nearly, but not exactly, real arithmetic.
"""

from __future__ import annotations

import numpy as np

from fedlearn.algorithm.transforms import Context
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.noise_grid import round_to_grid
from fedlearn.core.random import Purpose, generator, secret_normals
from fedlearn.core.records import Array


def standard_normals(shape: tuple[int, ...], context: Context, *, client: int | None = None) -> np.ndarray:
    """Return standard normal numbers, float64.

    Args:
        shape: shape of the result.
        context: run mode, seed and round. In deployment the numbers come from the operating system's cryptographic
            generator and cannot be repeated. In simulations they follow from seed, round and client, so a resumed run
            adds the same noise as an uninterrupted run.
        client: id of the client that adds the noise; None for the server.
    """
    if context.deployed:
        return secret_normals(shape)
    rng = generator(context.seed, Purpose.NOISE, round=context.round, client=0 if client is None else client + 1)
    return rng.standard_normal(shape)


def add_gaussian_noise(update: Array, noise: np.ndarray, std: float) -> Array:
    """Return ``update + std * noise``, added in float64 and rounded to the grid.

    Args:
        update: numbers, ``(..., D)``.
        noise: standard normal numbers, of the same shape.
        std: standard deviation of the noise, > 0.

    Returns:
        Float32 array of the library of ``update``.
    """
    exact = as_numpy(update).astype(np.float64) + std * noise
    return asarray_like(round_to_grid(exact, std).astype(np.float32), update)
