"""Basic models in PyTorch. `simulations.models.basic.jax` has the same models under the same names.

Shapes: B batch, F features, H height, W width, C channels, O outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

Module = nn.Module


class Cnn(nn.Module):
    """Two 3 x 3 convolutions (16 and 32 channels), each with ELU and a 2 x 2 mean, then an affine map."""

    def __init__(self, image_HWC: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        height, width, channels = image_HWC
        self.conv_0 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv_1 = nn.Conv2d(16, 32, 3, padding=1)
        self.out = nn.Linear(32 * (height // 4) * (width // 4), num_outputs)

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O)``."""
        x_BCHW = x_BHWC.permute(0, 3, 1, 2)  # no copy: the result has the fast channels-last layout
        x_BCHW = F.avg_pool2d(F.elu(self.conv_0(x_BCHW)), 2)
        x_BCHW = F.avg_pool2d(F.elu(self.conv_1(x_BCHW)), 2)
        return self.out(x_BCHW.flatten(1))


def linear(num_inputs: int, num_outputs: int) -> nn.Module:
    """Return a linear or logistic regression, which maps inputs ``(B, ...)`` to outputs ``(B, O)``."""
    return mlp([num_inputs, num_outputs])


def mlp(widths: Sequence[int]) -> nn.Module:
    """Return a multilayer perceptron with ELU, which maps inputs ``(B, ...)`` to outputs ``(B, O)``.

    Args:
        widths: number of inputs, widths of the hidden layers, and number of outputs.
    """
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for number, (num_inputs, num_outputs) in enumerate(pairwise(widths[:-1])):
        layers[f"hidden_{number}"] = nn.Linear(num_inputs, num_outputs)
        layers[f"elu_{number}"] = nn.ELU()
    layers["out"] = nn.Linear(widths[-2], widths[-1])
    return nn.Sequential(OrderedDict(layers))


def cnn(image_HWC: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return a network of two convolutions and an affine map."""
    return Cnn(image_HWC, num_outputs)
