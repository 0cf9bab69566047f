"""Basic models in JAX (flax linen). `simulations.models.basic.torch` has the same models under the same names.

Shapes: B batch, F features, H height, W width, C channels, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

Module = nn.Module


class Linear(nn.Module):
    """An affine map, for linear and logistic regression."""

    num_outputs: int

    @nn.compact
    def __call__(self, x_BF: jax.Array, *, train: bool = False) -> jax.Array:
        """Map inputs ``(B, ...)`` to outputs ``(B, O)``."""
        return nn.Dense(self.num_outputs, name="out")(flatten(x_BF))


class Mlp(nn.Module):
    """A multilayer perceptron with ELU between its affine maps. ``widths`` includes the inputs and the outputs."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x_BF: jax.Array, *, train: bool = False) -> jax.Array:
        """Map inputs ``(B, ...)`` to outputs ``(B, O)``."""
        x_BF = flatten(x_BF)
        for layer, width in enumerate(self.widths[1:-1]):
            x_BF = nn.elu(nn.Dense(width, name=f"hidden_{layer}")(x_BF))
        return nn.Dense(self.widths[-1], name="out")(x_BF)


class Conv(nn.Module):
    """A convolution, computed as one matrix product over shifted images. ``padding`` counts the zeros on each side.

    Clients train inside a compiled loop. There, XLA's own convolution is ten times slower on a CPU.
    """

    num_outputs: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Map ``(B, H, W, C)`` to ``(B, H', W', O)`` with ``H' = (H + 2 padding - size) // stride + 1``."""
        channels, size, pad = x_BHWC.shape[-1], self.kernel_size, (self.padding, self.padding)
        kernel_HWCO = self.param("kernel", nn.initializers.lecun_normal(), (size, size, channels, self.num_outputs))
        bias_O = self.param("bias", nn.initializers.zeros, (self.num_outputs,))
        padded = jnp.pad(x_BHWC, ((0, 0), pad, pad, (0, 0)))
        height, width = (length - size + 1 for length in padded.shape[1:3])
        corners = [(i, j) for i in range(size) for j in range(size)]
        shifted = [padded[:, i : i + height : self.stride, j : j + width : self.stride] for i, j in corners]
        patches = jnp.concatenate(shifted, axis=-1)
        return patches @ kernel_HWCO.reshape(size * size * channels, self.num_outputs) + bias_O


class Cnn(nn.Module):
    """Two 3 x 3 convolutions (16 and 32 channels), each with ELU and a 2 x 2 mean, then an affine map."""

    num_outputs: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O)``."""
        x_BHWC = avg_pool_2x2(nn.elu(Conv(16, name="conv_0")(x_BHWC)))
        x_BHWC = avg_pool_2x2(nn.elu(Conv(32, name="conv_1")(x_BHWC)))
        x_BCHW = x_BHWC.transpose(0, 3, 1, 2)  # the torch model flattens in this order
        return nn.Dense(self.num_outputs, name="out")(flatten(x_BCHW))


def linear(num_inputs: int, num_outputs: int) -> nn.Module:
    """Return a linear or logistic regression. Flax infers the number of inputs."""
    return Linear(num_outputs)


def mlp(widths: Sequence[int]) -> nn.Module:
    """Return a multilayer perceptron. ``widths`` includes the inputs and the outputs."""
    return Mlp(tuple(widths))


def cnn(image_HWC: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return a network of two convolutions and an affine map."""
    return Cnn(num_outputs)


def flatten(x: jax.Array) -> jax.Array:
    """Reshape inputs ``(B, ...)`` to ``(B, F)``."""
    return x.reshape(len(x), -1)


def avg_pool_2x2(x_BHWC: jax.Array) -> jax.Array:
    """Return the means of squares of 2 x 2 pixels, without an odd last row or column."""
    batch, height, width, channels = x_BHWC.shape
    even = x_BHWC[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
