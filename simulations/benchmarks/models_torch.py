"""Models of the workloads in PyTorch. `simulations.benchmarks.models_jax` has the same models.

Shapes: B batch, F features, H height, W width, C channels, O outputs.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from simulations.benchmarks.workloads import Workload


class Cnn(nn.Module):
    """Two 3 x 3 convolutions without padding (32 and 64 channels), 2 x 2 maxima, a hidden layer of 128, dropout."""

    def __init__(self, image_HWC: tuple[int, ...], num_outputs: int, *, dropout: bool) -> None:
        super().__init__()
        height, width, channels = image_HWC
        self.conv_0 = nn.Conv2d(channels, 32, 3)
        self.conv_1 = nn.Conv2d(32, 64, 3)
        self.hidden = nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.out = nn.Linear(128, num_outputs)
        self.drop_0, self.drop_1 = (nn.Dropout(share if dropout else 0.0) for share in (0.25, 0.5))

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O)``."""
        x_BCHW = x_BHWC.permute(0, 3, 1, 2)  # no copy: the result has the fast channels-last layout
        x_BCHW = F.max_pool2d(F.relu(self.conv_1(F.relu(self.conv_0(x_BCHW)))), 2)
        return self.out(self.drop_1(F.relu(self.hidden(self.drop_0(x_BCHW).flatten(1)))))


def mlp(num_inputs: int, num_outputs: int) -> nn.Module:
    """Return a multilayer perceptron with hidden widths 128 and 64, and ReLU."""
    layers = {
        "hidden_0": nn.Linear(num_inputs, 128),
        "relu_0": nn.ReLU(),
        "hidden_1": nn.Linear(128, 64),
        "relu_1": nn.ReLU(),
        "out": nn.Linear(64, num_outputs),
    }
    return nn.Sequential(OrderedDict(layers))


def linear(num_inputs: int, num_outputs: int) -> nn.Module:
    """Return an affine map, for logistic regression."""
    return nn.Sequential(OrderedDict(out=nn.Linear(num_inputs, num_outputs)))


def module(workload: Workload) -> nn.Module:
    """Return the torch module of a workload."""
    if workload.model == "cnn":
        return Cnn(workload.input_shape, workload.num_outputs, dropout=workload.dropout)
    return {"mlp": mlp, "linear": linear}[workload.model](workload.input_shape[0], workload.num_outputs)
