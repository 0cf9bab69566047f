"""Models of the workloads in JAX (flax linen). `simulations.benchmarks.models_torch` has the same models.

Shapes: B batch, F features, H height, W width, C channels, O outputs.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from simulations.benchmarks.workloads import Workload
from simulations.models.basic.jax import Conv


class Mlp(nn.Module):
    """A multilayer perceptron with hidden widths 128 and 64, and ReLU."""

    num_outputs: int

    @nn.compact
    def __call__(self, x_BF: jax.Array, *, train: bool = False) -> jax.Array:
        """Map features ``(B, F)`` to outputs ``(B, O)``."""
        for layer, width in enumerate((128, 64)):
            x_BF = nn.relu(nn.Dense(width, name=f"hidden_{layer}")(x_BF))
        return nn.Dense(self.num_outputs, name="out")(x_BF)


class Linear(nn.Module):
    """An affine map, for logistic regression."""

    num_outputs: int

    @nn.compact
    def __call__(self, x_BF: jax.Array, *, train: bool = False) -> jax.Array:
        """Map features ``(B, F)`` to outputs ``(B, O)``."""
        return nn.Dense(self.num_outputs, name="out")(x_BF)


class Cnn(nn.Module):
    """Two 3 x 3 convolutions without padding (32 and 64 channels), 2 x 2 maxima, a hidden layer of 128, dropout."""

    num_outputs: int
    dropout: bool

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O)``."""
        deterministic = not (train and self.dropout)
        x_BHWC = nn.relu(Conv(32, padding=0, name="conv_0")(x_BHWC))
        x_BHWC = max_2x2(nn.relu(Conv(64, padding=0, name="conv_1")(x_BHWC)))
        x_BHWC = nn.Dropout(0.25, deterministic=deterministic)(x_BHWC)
        x_BF = x_BHWC.transpose(0, 3, 1, 2).reshape(len(x_BHWC), -1)  # the torch model flattens in this order
        x_BF = nn.relu(nn.Dense(128, name="hidden")(x_BF))
        return nn.Dense(self.num_outputs, name="out")(nn.Dropout(0.5, deterministic=deterministic)(x_BF))


def max_2x2(x_BHWC: jax.Array) -> jax.Array:
    """Return the maxima of squares of 2 x 2 pixels, without an odd last row or column, as in torch."""
    batch, height, width, channels = x_BHWC.shape
    even = x_BHWC[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def module(workload: Workload) -> nn.Module:
    """Return the flax module of a workload."""
    if workload.model == "cnn":
        return Cnn(workload.num_outputs, workload.dropout)
    return {"mlp": Mlp, "linear": Linear}[workload.model](workload.num_outputs)
