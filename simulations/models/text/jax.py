"""Text models in JAX (flax linen). `simulations.models.text.torch` has the same models under the same names.

A text is a row of token numbers, padded with 0 at its end. Padding does not change the outputs of a model.

Shapes: B batch, T positions, E width, H hidden, A heads, C outputs.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from simulations.models.text import sinusoids

Module = nn.Module
MASK_PENALTY = 1e9  # subtracted from the scores of masked positions before a softmax
zeros = nn.initializers.zeros


def next_token_loss(outputs_BTC: jax.Array, y_BT: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of each text over its positions with a target. A target of -1 means none."""
    real_BT = y_BT >= 0
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(outputs_BTC, jnp.maximum(y_BT, 0))
    return (loss_BT * real_BT).sum(1) / jnp.maximum(real_BT.sum(1), 1)


class Recurrent(nn.Module):
    """A layer of LSTM (four gates) or GRU (three gates).

    A backward layer starts at the end of the row, and its state stays zero until the text begins.
    """

    hidden: int
    num_gates: int
    backward: bool = False

    @nn.compact
    def __call__(self, x_BTE: jax.Array, real_BT: jax.Array) -> jax.Array:
        """Map token vectors ``(B, T, E)`` to states ``(B, T, H)``."""
        cell, num_gates = _lstm if self.num_gates == 4 else _gru, self.num_gates * self.hidden
        # These weights have the orientation of torch: the trainer transposes only weights with the names of flax.
        input_weight = self.param("input_weight", zeros, (num_gates, x_BTE.shape[-1]))
        hidden_weight = self.param("hidden_weight", zeros, (num_gates, self.hidden))
        drive_BTG = x_BTE @ input_weight.T + self.param("bias", zeros, (num_gates,))

        def step(state: tuple[jax.Array, ...], now: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            drive, real_B1 = now
            state = cell(drive, state[0] @ hidden_weight.T, *state)
            if self.backward:
                state = tuple(part_BH * real_B1 for part_BH in state)
            return state, state[0]

        state = (jnp.zeros((len(x_BTE), self.hidden)),) * (self.num_gates - 2)
        times = (drive_BTG.swapaxes(0, 1), real_BT.astype(x_BTE.dtype).T[:, :, None])
        _, h_TBH = jax.lax.scan(step, state, times, reverse=self.backward)
        return h_TBH.swapaxes(0, 1)


def _lstm(drive: jax.Array, recall: jax.Array, h: jax.Array, c: jax.Array) -> tuple[jax.Array, ...]:
    enter, forget, new, show = jnp.split(drive + recall, 4, axis=-1)
    c = jax.nn.sigmoid(forget + 1) * c + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return jax.nn.sigmoid(show) * jnp.tanh(c), c


def _gru(drive: jax.Array, recall: jax.Array, h: jax.Array) -> tuple[jax.Array, ...]:
    (reset, keep, new), (reset_h, keep_h, new_h) = jnp.split(drive, 3, axis=-1), jnp.split(recall, 3, axis=-1)
    candidate = jnp.tanh(new + jax.nn.sigmoid(reset + reset_h) * new_h)
    return (candidate + jax.nn.sigmoid(keep + keep_h) * (h - candidate),)


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each on normalized inputs and with a residual connection."""

    num_heads: int
    causal: bool

    @nn.compact
    def __call__(self, x_BTE: jax.Array, real_BT: jax.Array) -> jax.Array:
        """Map token vectors ``(B, T, E)`` to token vectors ``(B, T, E)``."""
        batch, positions, width = x_BTE.shape
        visible_BATT = real_BT[:, None, None, :]
        if self.causal:
            visible_BATT = visible_BATT & jnp.tril(jnp.ones((positions, positions), bool))
        qkv = nn.Dense(3 * width, name="qkv")(_norm("norm_0")(x_BTE))
        query, key, value = qkv.reshape(batch, positions, 3, self.num_heads, -1).transpose(2, 0, 3, 1, 4)
        score_BATT = query @ key.swapaxes(2, 3) / sqrt(width / self.num_heads) - MASK_PENALTY * ~visible_BATT
        mixed_BATE = jax.nn.softmax(score_BATT, axis=-1) @ value
        mixed_BTE = mixed_BATE.swapaxes(1, 2).reshape(batch, positions, width)
        x_BTE = x_BTE + nn.Dense(width, name="mix")(mixed_BTE)
        up = nn.gelu(nn.Dense(4 * width, name="up")(_norm("norm_1")(x_BTE)))
        return x_BTE + nn.Dense(width, name="down")(up)


class TextCnn(nn.Module):
    """Affine maps of 2 and 3 neighbouring tokens, ELU, a mean over the text, then an affine map."""

    vocab_size: int
    num_outputs: int
    width: int
    hidden: int

    @nn.compact
    def __call__(self, x_BT: jax.Array) -> jax.Array:
        """Map token numbers ``(B, T)`` to outputs ``(B, C)``."""
        tokens_BT, real_BT = _read(x_BT)
        x_BTE = nn.Embed(self.vocab_size, self.width, name="embed")(tokens_BT) * real_BT[:, :, None]
        padded = jnp.pad(x_BTE, ((0, 0), (0, 2), (0, 0)))
        shifted = [padded[:, i : i + x_BT.shape[1]] for i in range(3)]
        pairs = nn.elu(nn.Dense(self.hidden, name="conv_2")(jnp.concatenate(shifted[:2], axis=2)))
        triples = nn.elu(nn.Dense(self.hidden, name="conv_3")(jnp.concatenate(shifted, axis=2)))
        whole_BE = _mean(jnp.concatenate([x_BTE, pairs, triples], axis=2), real_BT)
        return nn.Dense(self.num_outputs, name="out")(whole_BE)


class BiLstm(nn.Module):
    """An LSTM from each end of the text, a mean over the text, then an affine map."""

    vocab_size: int
    num_outputs: int
    width: int
    hidden: int

    @nn.compact
    def __call__(self, x_BT: jax.Array) -> jax.Array:
        """Map token numbers ``(B, T)`` to outputs ``(B, C)``."""
        tokens_BT, real_BT = _read(x_BT)
        x_BTE = nn.Embed(self.vocab_size, self.width, name="embed")(tokens_BT)
        forth = Recurrent(self.hidden, 4, name="forth")(x_BTE, real_BT)
        back = Recurrent(self.hidden, 4, backward=True, name="back")(x_BTE, real_BT)
        return nn.Dense(self.num_outputs, name="out")(_mean(jnp.concatenate([forth, back], axis=2), real_BT))


class RecurrentClassifier(nn.Module):
    """An LSTM or a GRU from the start of the text, a mean over the text, then an affine map."""

    vocab_size: int
    num_outputs: int
    width: int
    hidden: int
    num_gates: int

    @nn.compact
    def __call__(self, x_BT: jax.Array) -> jax.Array:
        """Map token numbers ``(B, T)`` to outputs ``(B, C)``."""
        tokens_BT, real_BT = _read(x_BT)
        x_BTE = nn.Embed(self.vocab_size, self.width, name="embed")(tokens_BT)
        h_BTH = Recurrent(self.hidden, self.num_gates, name="forth")(x_BTE, real_BT)
        return nn.Dense(self.num_outputs, name="out")(_mean(h_BTH, real_BT))


class Encoder(nn.Module):
    """Transformer blocks with sinusoidal positions, a mean over the text, then an affine map."""

    vocab_size: int
    num_outputs: int
    width: int
    num_heads: int
    num_layers: int
    causal: bool

    @nn.compact
    def __call__(self, x_BT: jax.Array) -> jax.Array:
        """Map token numbers ``(B, T)`` to outputs ``(B, C)``, or to ``(B, T, C)`` if causal."""
        tokens_BT, real_BT = _read(x_BT)
        x_BTE = nn.Embed(self.vocab_size, self.width, name="embed")(tokens_BT) * sqrt(self.width)
        x_BTE = x_BTE + sinusoids(x_BT.shape[1], self.width)
        for layer in range(self.num_layers):
            x_BTE = Block(self.num_heads, self.causal, name=f"block_{layer}")(x_BTE, real_BT)
        x_BTE = _norm("norm")(x_BTE)
        return nn.Dense(self.num_outputs, name="out")(x_BTE if self.causal else _mean(x_BTE, real_BT))


class NextToken(nn.Module):
    """Recurrent layers that predict the next token at each position."""

    vocab_size: int
    width: int
    hidden: int
    num_layers: int
    num_gates: int

    @nn.compact
    def __call__(self, x_BT: jax.Array) -> jax.Array:
        """Map token numbers ``(B, T)`` to outputs ``(B, T, C)``."""
        tokens_BT, real_BT = _read(x_BT)
        x_BTE = nn.Embed(self.vocab_size, self.width, name="embed")(tokens_BT)
        for layer in range(self.num_layers):
            x_BTE = Recurrent(self.hidden, self.num_gates, name=f"layer_{layer}")(x_BTE, real_BT)
        return nn.Dense(self.vocab_size, name="out")(x_BTE)


class Tagger(nn.Module):
    """An LSTM or a GRU from each end of the sentence, then an affine map of each position."""

    vocab_size: int
    num_outputs: int
    width: int
    hidden: int
    num_gates: int

    @nn.compact
    def __call__(self, x_BT: jax.Array) -> jax.Array:
        """Map token numbers ``(B, T)`` to outputs ``(B, T, C)``."""
        tokens_BT, real_BT = _read(x_BT)
        x_BTE = nn.Embed(self.vocab_size, self.width, name="embed")(tokens_BT)
        forth = Recurrent(self.hidden, self.num_gates, name="forth")(x_BTE, real_BT)
        back = Recurrent(self.hidden, self.num_gates, backward=True, name="back")(x_BTE, real_BT)
        return nn.Dense(self.num_outputs, name="out")(jnp.concatenate([forth, back], axis=2))


def _norm(name: str) -> nn.LayerNorm:
    """Return a layer norm with the epsilon and the variance of torch."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


def _read(x_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the token numbers, and a mask that is false at padding."""
    return x_BT.astype(jnp.int32), x_BT > 0


def _mean(x_BTE: jax.Array, real_BT: jax.Array) -> jax.Array:
    """Return the mean over the tokens of each text; zero for an empty text."""
    return (x_BTE * real_BT[:, :, None]).sum(1) / jnp.maximum(real_BT.sum(1, keepdims=True), 1)


def cnn(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a text CNN of width 64."""
    return TextCnn(vocab_size, num_outputs, width=64, hidden=64)


def bilstm(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a bidirectional LSTM of width 64."""
    return BiLstm(vocab_size, num_outputs, width=64, hidden=64)


def lstm(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return an LSTM of width 64."""
    return RecurrentClassifier(vocab_size, num_outputs, width=64, hidden=64, num_gates=4)


def gru(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a GRU of width 64."""
    return RecurrentClassifier(vocab_size, num_outputs, width=64, hidden=64, num_gates=3)


def transformer(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a Transformer encoder of two layers, width 64, 4 heads."""
    return Encoder(vocab_size, num_outputs, width=64, num_heads=4, num_layers=2, causal=False)


def next_lstm(vocab_size: int) -> nn.Module:
    """Return the model of LEAF: an embedding of 8 and two LSTM layers of 256."""
    return NextToken(vocab_size, width=8, hidden=256, num_layers=2, num_gates=4)


def next_gru(vocab_size: int) -> nn.Module:
    """Return an embedding of 32 and one GRU layer of 256."""
    return NextToken(vocab_size, width=32, hidden=256, num_layers=1, num_gates=3)


def next_transformer(vocab_size: int) -> nn.Module:
    """Return a causal Transformer of two layers, width 128, 4 heads."""
    return Encoder(vocab_size, vocab_size, width=128, num_heads=4, num_layers=2, causal=True)


def tag_gru(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a bidirectional GRU of width 64 with outputs per token."""
    return Tagger(vocab_size, num_outputs, width=64, hidden=64, num_gates=3)


def tag_bilstm(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a bidirectional LSTM of width 64 with outputs per token."""
    return Tagger(vocab_size, num_outputs, width=64, hidden=64, num_gates=4)
