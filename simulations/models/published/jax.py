"""Networks of published experiments in JAX. `simulations.models.published.torch` has the same networks.

Shapes: B batch, H height, W width, C channels, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn

from simulations.models.basic.jax import Conv, flatten
from simulations.models.published import Convolution, Dropout, Layer, MaxPool, Standardize


class PublishedNetwork(nn.Module):
    """A sequence of layers with ReLU, and an affine map to the outputs. See the twin in PyTorch."""

    layers: Sequence[Layer]
    input_shape: Sequence[int]
    num_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Map inputs ``(B, ...)``, or images ``(B, H, W, C)``, to outputs ``(B, O)``."""
        for number, layer in enumerate(self.layers):
            if isinstance(layer, Standardize):
                x = (x - layer.mean) / layer.deviation
            elif isinstance(layer, Convolution):
                sizes = (layer.channels, layer.size, layer.stride, layer.padding)
                x = nn.relu(Conv(*sizes, name=f"conv_{number}")(x))
            elif isinstance(layer, MaxPool):
                x = nn.max_pool(x, (layer.size, layer.size), (layer.stride, layer.stride))
            elif isinstance(layer, Dropout):
                x = nn.Dropout(layer.rate, deterministic=not train)(x)
            else:
                x = nn.relu(nn.Dense(layer.width, name=f"dense_{number}")(_as_in_torch(x)))
        return nn.Dense(self.num_outputs, name="out")(_as_in_torch(x))


def _as_in_torch(x: jax.Array) -> jax.Array:
    """Flatten each example in the order of torch, which has channels first."""
    return flatten(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x)
