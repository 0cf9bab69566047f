"""Networks of published experiments in PyTorch. `simulations.models.published.jax` has the same networks.

Shapes: B batch, H height, W width, C channels, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from simulations.models.published import Convolution, Dense, Dropout, Layer, MaxPool, Standardize, sizes_after


class PublishedNetwork(nn.Module):
    """A sequence of layers with ReLU, and an affine map to the outputs.

    Args:
        layers: layers in order, see `simulations.models.published`.
        input_shape: shape of one example.
        num_outputs: number of outputs O.
    """

    def __init__(self, layers: Sequence[Layer], input_shape: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        self.layers = layers
        shapes = sizes_after(layers, input_shape)
        for number, (layer, shape) in enumerate(zip(layers, shapes[:-1], strict=True)):
            if isinstance(layer, Convolution):
                convolution = nn.Conv2d(shape[2], layer.channels, layer.size, layer.stride, layer.padding)
                self.add_module(f"conv_{number}", convolution)
            elif isinstance(layer, Dense):
                self.add_module(f"dense_{number}", nn.Linear(prod(shape), layer.width))
            elif isinstance(layer, Dropout):
                self.add_module(f"dropout_{number}", nn.Dropout(layer.rate))
        self.out = nn.Linear(prod(shapes[-1]), num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map inputs ``(B, ...)``, or images ``(B, H, W, C)``, to outputs ``(B, O)``."""
        x = x.permute(0, 3, 1, 2) if x.dim() == 4 else x
        for number, layer in enumerate(self.layers):
            if isinstance(layer, Standardize):
                x = (x - layer.mean) / layer.deviation
            elif isinstance(layer, Convolution):
                x = F.relu(self.get_submodule(f"conv_{number}")(x))
            elif isinstance(layer, MaxPool):
                x = F.max_pool2d(x, layer.size, layer.stride)
            elif isinstance(layer, Dropout):
                x = self.get_submodule(f"dropout_{number}")(x)
            else:
                x = F.relu(self.get_submodule(f"dense_{number}")(x.flatten(1)))
        return self.out(x.flatten(1))
