"""Recommenders in JAX (flax linen). Each has a twin of the same name in `simulations.models.recommendation.torch`.

A model is one user's: its leaves ``user.*`` are that user's own, all others are about the items.

Shapes: B batch, F factors, H hidden.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

Module = nn.Module
zeros = nn.initializers.zeros


class User(nn.Module):
    """What is known of one user: vectors of F numbers, and a bias."""

    num_factors: int
    num_vectors: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """The vectors and the bias."""
        return self.param("vectors", zeros, (self.num_vectors, self.num_factors)), self.param("bias", zeros, (1,))


class MatrixFactorization(nn.Module):
    """``mu + b_u + b_i + p_u q_i``: biased matrix factorisation."""

    num_items: int
    num_factors: int
    global_mean: float

    @nn.compact
    def __call__(self, x_B: jax.Array) -> jax.Array:
        """Item numbers ``(B,)`` to ``(B, 1)``."""
        item_B = x_B.astype(jnp.int32)
        vectors, bias = User(self.num_factors, 1, name="user")()
        match_B1 = nn.Embed(self.num_items, self.num_factors, name="items")(item_B) @ vectors.T
        return self.global_mean + bias + nn.Embed(self.num_items, 1, name="item_bias")(item_B) + match_B1


class NeuralCollaborativeFiltering(nn.Module):
    """An affine map of products of factors (GMF) beside a perceptron on a second pair of vectors (MLP)."""

    num_items: int
    num_factors: int
    global_mean: float

    @nn.compact
    def __call__(self, x_B: jax.Array) -> jax.Array:
        """Item numbers ``(B,)`` to ``(B, 1)``."""
        item_B = x_B.astype(jnp.int32)
        vectors, bias = User(self.num_factors, 2, name="user")()
        items_BF = nn.Embed(self.num_items, 2 * self.num_factors, name="items")(item_B)
        product_BF, beside_BF = jnp.split(items_BF, 2, axis=1)
        pair_BF = jnp.concatenate([beside_BF, jnp.broadcast_to(vectors[1], beside_BF.shape)], axis=1)
        hidden_BF = nn.elu(nn.Dense(2 * self.num_factors, name="hidden_0")(pair_BF))
        mlp_BF = nn.elu(nn.Dense(self.num_factors, name="hidden_1")(hidden_BF))
        score_B1 = nn.Dense(1, name="out")(jnp.concatenate([product_BF * vectors[0], mlp_BF], axis=1))
        return self.global_mean + bias + nn.Embed(self.num_items, 1, name="item_bias")(item_B) + score_B1


def mf(num_items: int, num_factors: int, global_mean: float) -> nn.Module:
    """Biased matrix factorisation."""
    return MatrixFactorization(num_items, num_factors, global_mean)


def ncf(num_items: int, num_factors: int, global_mean: float) -> nn.Module:
    """Neural collaborative filtering."""
    return NeuralCollaborativeFiltering(num_items, num_factors, global_mean)
