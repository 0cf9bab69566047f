"""Add the noise of DP-SGD to a sum of clipped gradients, on the grid of `fedlearn.core.noise_grid`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from fedlearn.core.noise_grid import grid_step, round_to_grid
from fedlearn.core.random import secret_normals


def add_noise(total: Any, std: float, key: jax.Array, *, secret: bool) -> Any:
    """Return a tree of sums plus Gaussian noise, rounded to the grid.

    Args:
        total: tree of float32 arrays.
        std: standard deviation of the noise, > 0.
        key: key of the noise in a simulation.
        secret: whether the clients are real. Their noise comes from the operating system. It is drawn, added and
            rounded in float64, outside the program. The noise of a simulation is drawn and added in float32. It hides
            nothing, because it follows from the seed; its standard deviation and its grid are the same.
    """
    leaves, tree = jax.tree.flatten(total)
    if secret:
        shapes = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in leaves]
        return jax.tree.unflatten(tree, io_callback(partial(_add_secret_noise, std), shapes, leaves))
    ends = np.cumsum([leaf.size for leaf in leaves])
    noise = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])
    noisy = [_round(leaf + std * n.reshape(leaf.shape), std) for leaf, n in zip(leaves, noise, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def _add_secret_noise(std: float, leaves: list[Any]) -> list[np.ndarray]:
    exact = [np.asarray(leaf, np.float64) + std * secret_normals(leaf.shape) for leaf in leaves]
    return [round_to_grid(leaf, std).astype(np.float32) for leaf in exact]


def _round(values: jax.Array, std: float) -> jax.Array:
    """Round to the grid. Division by its step is exact in float32, because the step is a power of two."""
    step = grid_step(std)
    return jnp.round(values / step) * step if step >= jnp.finfo(jnp.float32).tiny else values
