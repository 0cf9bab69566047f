"""Networks for images in PyTorch. `simulations.models.vision.jax` has the same networks under the same names.

Shapes: B batch, H height, W width, C channels, O outputs.

By default, the networks normalize groups of channels within one image (group norm). Batch statistics have three
disadvantages: they are sent with the model, they differ between clients, and the output for one example depends on
others. With ``norm="batch"``, the networks use batch statistics.

References: Wu, He, *Group Normalization*, ECCV 2018, arXiv:1803.08494; Ioffe, Szegedy, *Batch Normalization*, ICML
2015, arXiv:1502.03167.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class PlainNet(nn.Module):
    """Stages of 3 x 3 convolutions, then affine maps.

    Each convolution is followed by a normalization and ELU, each stage by a 2 x 2 mean.

    Args:
        image_HWC: shape of an image, at least ``2 ** len(stages)`` pixels high and wide.
        stages: channels of each convolution, stage by stage.
        hidden: widths of the affine maps before the last one.
        num_outputs: number of outputs O.
        norm: normalization, ``group`` (default) or ``batch``.
    """

    def __init__(
        self,
        image_HWC: Sequence[int],
        stages: Sequence[Sequence[int]],
        hidden: Sequence[int],
        num_outputs: int,
        norm: str = "group",
    ) -> None:
        super().__init__()
        height, width, channels = image_HWC
        self.stages, self.num_hidden, number = stages, len(hidden), 0
        for num_channels in [c for stage in stages for c in stage]:
            self.add_module(f"conv_{number}", nn.Conv2d(channels, num_channels, 3, padding=1))
            self.add_module(f"norm_{number}", _norm(num_channels, norm))
            channels, number = num_channels, number + 1
        widths = [channels * (height >> len(stages)) * (width >> len(stages)), *hidden]
        for layer in range(self.num_hidden):
            self.add_module(f"hidden_{layer}", nn.Linear(widths[layer], widths[layer + 1]))
        self.out = nn.Linear(widths[-1], num_outputs)

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O)``."""
        x, number = x_BHWC.permute(0, 3, 1, 2), 0
        for stage in self.stages:
            for _ in stage:
                x = self.get_submodule(f"norm_{number}")(self.get_submodule(f"conv_{number}")(x))
                x, number = F.elu(x), number + 1
            x = F.avg_pool2d(x, 2)
        x = x.flatten(1)
        for layer in range(self.num_hidden):
            x = F.elu(self.get_submodule(f"hidden_{layer}")(x))
        return self.out(x)


class LeNet(nn.Module):
    """LeNet-5 with ELU and full connections.

    Two 5 x 5 convolutions with 2 x 2 means come first, then affine maps of 120, 84 and O outputs.

    Reference: LeCun, Bottou, Bengio, Haffner, *Gradient-Based Learning Applied to Document Recognition*, Proceedings
    of the IEEE 86, 1998.
    """

    def __init__(self, image_HWC: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        height, width, channels = image_HWC
        self.conv_0 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv_1 = nn.Conv2d(6, 16, 5)
        self.hidden_0 = nn.Linear(16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2), 120)
        self.hidden_1 = nn.Linear(120, 84)
        self.out = nn.Linear(84, num_outputs)

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O)``."""
        x = F.avg_pool2d(F.elu(self.conv_0(x_BHWC.permute(0, 3, 1, 2))), 2)
        x = F.avg_pool2d(F.elu(self.conv_1(x)), 2).flatten(1)
        return self.out(F.elu(self.hidden_1(F.elu(self.hidden_0(x)))))


class ResidualBlock(nn.Module):
    """Two normalized 3 x 3 convolutions, added to a shortcut.

    The shortcut is a 1 x 1 convolution if the block changes the shape, else the identity.
    """

    def __init__(self, num_inputs: int, num_channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv_0 = nn.Conv2d(num_inputs, num_channels, 3, stride=stride, padding=1)
        self.norm_0 = _norm(num_channels, norm)
        self.conv_1 = nn.Conv2d(num_channels, num_channels, 3, padding=1)
        self.norm_1 = _norm(num_channels, norm)
        changes = stride > 1 or num_inputs != num_channels
        self.shortcut = nn.Conv2d(num_inputs, num_channels, 1, stride=stride) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C', H', W')``."""
        change = self.norm_1(self.conv_1(F.elu(self.norm_0(self.conv_0(x)))))
        return F.elu(change + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """A residual network for small images, with ``3 x num_blocks`` blocks of 16, 32 and 64 channels.

    It differs from the paper by group norm (unless ``norm="batch"``), by ELU and by shortcuts with 1 x 1 convolutions.

    Reference: He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016, arXiv:1512.03385,
    section 4.2.
    """

    def __init__(self, image_HWC: Sequence[int], num_blocks: int, num_outputs: int, norm: str = "group") -> None:
        super().__init__()
        self.num_blocks, channels = 3 * num_blocks, 16
        self.conv = nn.Conv2d(image_HWC[-1], channels, 3, padding=1)
        self.norm = _norm(channels, norm)
        for number in range(self.num_blocks):
            num_channels = 16 << (number // num_blocks)
            stride = 2 if num_channels > channels else 1
            self.add_module(f"block_{number}", ResidualBlock(channels, num_channels, stride, norm))
            channels = num_channels
        self.out = nn.Linear(channels, num_outputs)

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O)``."""
        x = F.elu(self.norm(self.conv(x_BHWC.permute(0, 3, 1, 2))))
        for number in range(self.num_blocks):
            x = self.get_submodule(f"block_{number}")(x)
        return self.out(x.mean((2, 3)))


def _norm(num_channels: int, norm: str) -> nn.Module:
    return nn.BatchNorm2d(num_channels) if norm == "batch" else nn.GroupNorm(num_channels // 8, num_channels)


class UNet(nn.Module):
    """A small U-Net: two stages down, two stages up, and one output per class and pixel.

    Each convolution is followed by a group norm and ELU. Height and width are multiples of 4.

    Args:
        channels: channels of an image.
        num_outputs: number of classes O.
        width: channels of the first stage; the next stages have 2 and 4 times as many.

    Reference: Ronneberger, Fischer, Brox, *U-Net*, MICCAI 2015, arXiv:1505.04597.
    """

    def __init__(self, channels: int, num_outputs: int, width: int = 8) -> None:
        super().__init__()
        sizes = [
            (channels, width),
            (width, 2 * width),
            (2 * width, 4 * width),
            (6 * width, 2 * width),
            (3 * width, width),
        ]
        for number, (num_inputs, num_channels) in enumerate(sizes):
            self.add_module(f"conv_{number}", nn.Conv2d(num_inputs, num_channels, 3, padding=1))
            self.add_module(f"norm_{number}", _norm(num_channels, "group"))
        self.out = nn.Conv2d(width, num_outputs, 1)

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O, H, W)``."""
        fine = self._stage(0, x_BHWC.permute(0, 3, 1, 2))
        middle = self._stage(1, F.avg_pool2d(fine, 2))
        coarse = self._stage(2, F.avg_pool2d(middle, 2))
        middle = self._stage(3, torch.cat([_double(coarse), middle], dim=1))
        return self.out(self._stage(4, torch.cat([_double(middle), fine], dim=1)))

    def _stage(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return F.elu(self.get_submodule(f"norm_{number}")(self.get_submodule(f"conv_{number}")(x)))


def _double(x: torch.Tensor) -> torch.Tensor:
    """Repeat each pixel in both directions."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
