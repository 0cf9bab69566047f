"""The models in JAX (flax linen). Each has a twin of the same name in `simulations.models.torch`.

Shapes: B batch, F features, H height, W width, C channels, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

Module = nn.Module


class Linear(nn.Module):
    """One affine map: linear or logistic regression."""

    num_outputs: int

    @nn.compact
    def __call__(self, x_BF: jax.Array, *, train: bool = False) -> jax.Array:
        """``(B, ...) -> (B, O)``."""
        return nn.Dense(self.num_outputs, name="out")(_flatten(x_BF))


class Mlp(nn.Module):
    """Affine maps with ELU between them; ``widths`` runs from inputs to outputs."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x_BF: jax.Array, *, train: bool = False) -> jax.Array:
        """``(B, ...) -> (B, O)``."""
        x_BF = _flatten(x_BF)
        for layer, width in enumerate(self.widths[1:-1]):
            x_BF = nn.elu(nn.Dense(width, name=f"hidden_{layer}")(x_BF))
        return nn.Dense(self.widths[-1], name="out")(x_BF)


class Conv3x3(nn.Module):
    """A 3 x 3 convolution, as one matrix product over the nine shifted images; ``padding`` zeros on each side.

    XLA's own convolution runs ten times slower inside a compiled loop on a CPU, which is where clients train.
    """

    num_outputs: int
    padding: int = 1

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """``(B, H, W, C) -> (B, H, W, O)``; two rows and columns less without padding."""
        channels, pad = x_BHWC.shape[-1], (self.padding, self.padding)
        kernel_HWCO = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, channels, self.num_outputs))
        bias_O = self.param("bias", nn.initializers.zeros, (self.num_outputs,))
        padded = jnp.pad(x_BHWC, ((0, 0), pad, pad, (0, 0)))
        height, width = padded.shape[1] - 2, padded.shape[2] - 2
        shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, axis=-1) @ kernel_HWCO.reshape(9 * channels, self.num_outputs) + bias_O


class Cnn(nn.Module):
    """Two 3 x 3 convolutions (16 and 32 channels), each with ELU and 2 x 2 mean, then an affine map."""

    num_outputs: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """``(B, H, W, C) -> (B, O)``."""
        x_BHWC = _mean_2x2(nn.elu(Conv3x3(16, name="conv_0")(x_BHWC)))
        x_BHWC = _mean_2x2(nn.elu(Conv3x3(32, name="conv_1")(x_BHWC)))
        x_BCHW = x_BHWC.transpose(0, 3, 1, 2)  # the order in which the torch twin flattens
        return nn.Dense(self.num_outputs, name="out")(_flatten(x_BCHW))


def linear(num_inputs: int, num_outputs: int) -> nn.Module:
    """Linear or logistic regression; flax infers the number of inputs."""
    return Linear(num_outputs)


def mlp(widths: Sequence[int]) -> nn.Module:
    """A multilayer perceptron; ``widths`` runs from inputs to outputs."""
    return Mlp(tuple(widths))


def cnn(image_HWC: tuple[int, ...], num_outputs: int) -> nn.Module:
    """A small convolutional network."""
    return Cnn(num_outputs)


def _flatten(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)


def _mean_2x2(x_BHWC: jax.Array) -> jax.Array:
    batch, height, width, channels = x_BHWC.shape
    even = x_BHWC[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
