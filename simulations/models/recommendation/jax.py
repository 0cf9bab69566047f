"""Recommender models in JAX (flax linen). `simulations.models.recommendation.torch` has the same models.

A model serves one user. Its leaves ``user.*`` are the user's personal parameters; all others describe the items.

Shapes: B batch, F factors, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedlearn.data.subword_tokenizer import MASK
from fedlearn.trainers.jax.hugging_face import HuggingFaceNetwork, score_tokens
from fedlearn.trainers.jax.pretrained import TransformerModel
from fedlearn.trainers.pretrained import CAUSAL

Module = nn.Module
zeros = nn.initializers.zeros


class User(nn.Module):
    """Parameters of one user: vectors of F numbers, and a bias."""

    num_factors: int
    num_vectors: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Return the vectors of the user and the bias."""
        return self.param("vectors", zeros, (self.num_vectors, self.num_factors)), self.param("bias", zeros, (1,))


class MatrixFactorization(nn.Module):
    """Biased matrix factorization, ``mu + b_u + b_i + p_u q_i``."""

    num_items: int
    num_factors: int
    global_mean: float

    @nn.compact
    def __call__(self, x_B: jax.Array) -> jax.Array:
        """Map item numbers ``(B,)`` to scores ``(B, 1)``."""
        item_B = x_B.astype(jnp.int32)
        vectors, bias = User(self.num_factors, 1, name="user")()
        match_B1 = nn.Embed(self.num_items, self.num_factors, name="items")(item_B) @ vectors.T
        return self.global_mean + bias + nn.Embed(self.num_items, 1, name="item_bias")(item_B) + match_B1


class NeuralCollaborativeFiltering(nn.Module):
    """Neural collaborative filtering: an affine map of two parts, a product of factors (GMF) and a perceptron (MLP).

    Each part has its own vectors for the user and the items.
    """

    num_items: int
    num_factors: int
    global_mean: float

    @nn.compact
    def __call__(self, x_B: jax.Array) -> jax.Array:
        """Map item numbers ``(B,)`` to scores ``(B, 1)``."""
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
    """Return a model of biased matrix factorization."""
    return MatrixFactorization(num_items, num_factors, global_mean)


def ncf(num_items: int, num_factors: int, global_mean: float) -> nn.Module:
    """Return a model of neural collaborative filtering."""
    return NeuralCollaborativeFiltering(num_items, num_factors, global_mean)


def build_decoder(values: Mapping[str, Any]) -> HuggingFaceNetwork:
    """Return a decoder without trained weights from the values of a ``config.json``. It scores films."""
    return HuggingFaceNetwork(TransformerModel(values, {}, task=CAUSAL), score_films)


def score_films(logits_BTV: jax.Array, x: Mapping[str, jax.Array]) -> jax.Array:
    """Return the four outputs of each sequence, ``(B, 4)``; see `simulations.models.recommendation.next_film`."""
    candidates_BL, before_last_B = x["candidates"].astype(jnp.int32), x[MASK].sum(axis=1).astype(jnp.int32) - 2
    last_BV = jnp.take_along_axis(logits_BTV, jnp.maximum(before_last_B, 0)[:, None, None], axis=1)[:, 0]
    scores_BL = jax.lax.stop_gradient(jnp.take_along_axis(last_BV, candidates_BL, axis=1))
    rank_B = 1 + (scores_BL[:, 1:] >= scores_BL[:, :1]).sum(axis=1)
    rank_B = jnp.where(candidates_BL[:, 0] > 0, rank_B, 0).astype(jnp.float32)
    return jnp.concatenate([score_tokens(logits_BTV, x), rank_B[:, None]], axis=1)
