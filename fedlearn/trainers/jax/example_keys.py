"""Derive random keys from examples, so that the random numbers of an example follow it to any place in a batch.

Shapes: B batch, W 32-bit numbers of an example.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def example_keys(key: jax.Array, x_B: Any, y_B: jax.Array) -> jax.Array:
    """Return one key per example, from ``key`` and the content of the example.

    The key of an example depends on no other example, and not on its place in the batch. So dropout draws equal masks
    for the other examples if one example is removed, added or replaced. Equal examples get distinct keys by their rank.

    The hash of the content depends on ``key``. Otherwise the author of the data could choose different examples with
    equal hashes, and the rank of each would depend on the others.

    Args:
        key: key of the client and the local step. At real clients it comes from secret entropy.
        x_B: inputs of the batch.
        y_B: targets of the batch.
    """
    numbers_BW = jnp.concatenate(list(map(_as_uint32, jax.tree.leaves((x_B, y_B)))), axis=1)
    hash_key, draw_key = jax.random.split(key)
    places_2W = jax.random.bits(hash_key, (2, numbers_BW.shape[1]), jnp.uint32)
    low_B, high_B = (jnp.sum(_mix_bits(numbers_BW + place_W), 1, dtype=jnp.uint32) for place_W in places_2W)
    same_BB = (low_B[:, None] == low_B) & (high_B[:, None] == high_B)
    rank_B = jnp.sum(jnp.tril(same_BB, -1), 1, dtype=jnp.uint32)

    def key_of(*numbers: jax.Array) -> jax.Array:
        return reduce(jax.random.fold_in, numbers, draw_key)

    return jax.vmap(key_of)(low_B, high_B, rank_B)


def _as_uint32(values_B: jax.Array) -> jax.Array:
    """Return the bits of each example, ``(B, W)``."""
    values_B = jnp.asarray(values_B).reshape(len(values_B), -1)
    if jnp.issubdtype(values_B.dtype, jnp.floating):
        return lax.bitcast_convert_type(values_B.astype(jnp.float32), jnp.uint32)
    return values_B.astype(jnp.uint32)


def _mix_bits(z: jax.Array) -> jax.Array:
    """Mix the bits of 32-bit numbers: the finaliser of MurmurHash3 (Appleby, 2011)."""
    z = (z ^ (z >> 16)) * jnp.uint32(0x85EBCA6B)
    z = (z ^ (z >> 13)) * jnp.uint32(0xC2B2AE35)
    return z ^ (z >> 16)
