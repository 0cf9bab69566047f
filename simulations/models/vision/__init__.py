"""Networks for images, in both frameworks.

Shapes: H height, W width, C channels.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fedlearn.errors import SettingError

MIN_IMAGE_SIZE = {"gn_cnn": 8, "bn_cnn": 8, "lenet": 12, "vgg": 8}  # least height and width, pixels
MIN_IMAGE_SIZE |= {"resnet8": 4, "resnet20": 4, "resnet8_bn": 4, "resnet20_bn": 4}


def build_unet(framework: str, *, input_shape: tuple[int, ...], num_outputs: int) -> tuple[Any, str]:
    """Build a U-Net for segmentation, and describe it in one line.

    Args:
        framework: ``torch`` or ``jax``.
        input_shape: shape of one image, (H, W, C).
        num_outputs: number of classes.

    Raises:
        SettingError: The examples are not images, or height and width are not multiples of 4.
    """
    if len(input_shape) != 3 or any(size % 4 for size in input_shape[:2]):
        shown = "x".join(map(str, input_shape))
        expected = f"images whose height and width are multiples of 4, not {shown}"
        raise SettingError("model", "unet", expected, "scenario.image_size=64")
    networks = import_module(f"simulations.models.vision.{framework}")
    arguments = (input_shape[2], num_outputs) if framework == "torch" else (num_outputs,)
    return networks.UNet(*arguments), f"unet {'x'.join(map(str, input_shape))}-8-16-32-16-8-{num_outputs}"


def build_network(name: str, framework: str, *, input_shape: tuple[int, ...], num_outputs: int) -> tuple[Any, str]:
    """Build a network by name, and describe it in one line.

    Args:
        name: name of the network. ``gn_cnn`` has convolutions of 16, 32 and 64 channels with group norm. ``vgg`` has
            twice as many convolutions and a hidden layer. ``lenet`` is LeNet-5. ``resnet8`` and ``resnet20`` are
            residual networks with group norm. ``bn_cnn``, ``resnet8_bn`` and ``resnet20_bn`` have batch norm
            instead, and therefore buffers; see `fedlearn.algorithm.strategy.with_buffer_policy`.
        framework: ``torch`` or ``jax``.
        input_shape: shape of one example, (H, W, C).
        num_outputs: number of outputs of the network.

    Raises:
        SettingError: The examples are not images, or the images are too small.
    """
    least = MIN_IMAGE_SIZE[name]
    if len(input_shape) != 3 or min(input_shape[:2]) < least:
        expected = f"linear or mlp: the examples are not images of at least {least} x {least}"
        raise SettingError("model", name, expected, "model=mlp")
    networks = import_module(f"simulations.models.vision.{framework}")
    size = "x".join(map(str, input_shape))
    if name in ("gn_cnn", "bn_cnn"):
        norm = "batch" if name == "bn_cnn" else "group"
        return networks.PlainNet(input_shape, ((16,), (32,), (64,)), (), num_outputs, norm), f"{name} {size}-16-32-64"
    if name == "vgg":
        stages = ((16, 16), (32, 32), (64, 64))
        return networks.PlainNet(input_shape, stages, (128,), num_outputs), f"vgg {size}-16x2-32x2-64x2-128"
    if name == "lenet":
        return networks.LeNet(input_shape, num_outputs), f"lenet {size}-6-16-120-84"
    num_blocks, norm = 1 if name.startswith("resnet8") else 3, "batch" if name.endswith("_bn") else "group"
    return networks.ResNet(input_shape, num_blocks, num_outputs, norm), f"{name} {size}-16-32-64"
