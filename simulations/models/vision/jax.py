"""Networks for images in JAX (flax linen). `simulations.models.vision.torch` has the same networks.

Shapes: B batch, H height, W width, C channels, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from simulations.models.basic.jax import Conv, avg_pool_2x2, flatten


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

    image_HWC: Sequence[int]
    stages: Sequence[Sequence[int]]
    hidden: Sequence[int]
    num_outputs: int
    norm: str = "group"

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O)``."""
        x, number, norm = x_BHWC, 0, partial(_norm, self.norm, train)
        for stage in self.stages:
            for num_channels in stage:
                x = norm(num_channels, f"norm_{number}")(Conv(num_channels, name=f"conv_{number}")(x))
                x, number = nn.elu(x), number + 1
            x = avg_pool_2x2(x)
        x = _flattened_as_in_torch(x)
        for layer, width in enumerate(self.hidden):
            x = nn.elu(nn.Dense(width, name=f"hidden_{layer}")(x))
        return nn.Dense(self.num_outputs, name="out")(x)


class LeNet(nn.Module):
    """LeNet-5 with ELU and full connections.

    Two 5 x 5 convolutions with 2 x 2 means come first, then affine maps of 120, 84 and O outputs.
    """

    image_HWC: Sequence[int]
    num_outputs: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O)``."""
        x = avg_pool_2x2(nn.elu(Conv(6, kernel_size=5, padding=2, name="conv_0")(x_BHWC)))
        x = avg_pool_2x2(nn.elu(Conv(16, kernel_size=5, padding=0, name="conv_1")(x)))
        x = nn.elu(nn.Dense(120, name="hidden_0")(_flattened_as_in_torch(x)))
        return nn.Dense(self.num_outputs, name="out")(nn.elu(nn.Dense(84, name="hidden_1")(x)))


class ResidualBlock(nn.Module):
    """Two normalized 3 x 3 convolutions, added to a shortcut.

    The shortcut is a 1 x 1 convolution if the block changes the shape, else the identity.
    """

    num_channels: int
    stride: int
    norm: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map ``(B, H, W, C)`` to ``(B, H', W', C')``."""
        num_channels, stride, norm = self.num_channels, self.stride, partial(_norm, self.norm, train)
        change = norm(num_channels, "norm_0")(Conv(num_channels, stride=stride, name="conv_0")(x))
        change = norm(num_channels, "norm_1")(Conv(num_channels, name="conv_1")(nn.elu(change)))
        if stride > 1 or x.shape[-1] != num_channels:
            x = Conv(num_channels, kernel_size=1, stride=stride, padding=0, name="shortcut")(x)
        return nn.elu(change + x)


class ResNet(nn.Module):
    """A residual network for small images, with ``3 x num_blocks`` blocks of 16, 32 and 64 channels."""

    image_HWC: Sequence[int]
    num_blocks: int
    num_outputs: int
    norm: str = "group"

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O)``."""
        channels = 16
        x = nn.elu(_norm(self.norm, train, channels, "norm")(Conv(channels, name="conv")(x_BHWC)))
        for number in range(3 * self.num_blocks):
            num_channels = 16 << (number // self.num_blocks)
            stride = 2 if num_channels > channels else 1
            x = ResidualBlock(num_channels, stride, self.norm, name=f"block_{number}")(x, train=train)
            channels = num_channels
        return nn.Dense(self.num_outputs, name="out")(x.mean((1, 2)))


def _norm(norm: str, train: bool, num_channels: int, name: str) -> nn.Module:
    # Epsilon has the value of torch. The variance is computed by its definition, as in torch. Flax's fast variance,
    # a difference of squares, is rounded differently.
    if norm == "batch":  # a momentum of 0.9 in flax is a momentum of 0.1 in torch
        return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, name=name)
    return nn.GroupNorm(num_channels // 8, epsilon=1e-5, use_fast_variance=False, name=name)


def _flattened_as_in_torch(x_BHWC: jax.Array) -> jax.Array:
    return flatten(x_BHWC.transpose(0, 3, 1, 2))


class UNet(nn.Module):
    """A small U-Net: two stages down, two stages up, and one output per class and pixel.

    Each convolution is followed by a group norm and ELU. Height and width are multiples of 4.

    Args:
        num_outputs: number of classes O.
        width: channels of the first stage; the next stages have 2 and 4 times as many.
    """

    num_outputs: int
    width: int = 8

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images ``(B, H, W, C)`` to outputs ``(B, O, H, W)``."""

        def stage(number: int, num_channels: int, x: jax.Array) -> jax.Array:
            x = Conv(num_channels, name=f"conv_{number}")(x)
            return nn.elu(_norm("group", train, num_channels, f"norm_{number}")(x))

        fine = stage(0, self.width, x_BHWC)
        middle = stage(1, 2 * self.width, avg_pool_2x2(fine))
        coarse = stage(2, 4 * self.width, avg_pool_2x2(middle))
        middle = stage(3, 2 * self.width, jnp.concatenate([_double(coarse), middle], axis=-1))
        last = stage(4, self.width, jnp.concatenate([_double(middle), fine], axis=-1))
        return Conv(self.num_outputs, kernel_size=1, padding=0, name="out")(last).transpose(0, 3, 1, 2)


def _double(x_BHWC: jax.Array) -> jax.Array:
    """Repeat each pixel in both directions."""
    return jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2)
