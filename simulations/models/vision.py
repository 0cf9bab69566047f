"""Which networks there are for images, for either framework.

Shapes: H height, W width, C channels.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fedlearn.errors import SettingError

SMALLEST = {"gn_cnn": 8, "lenet": 12, "vgg": 8, "resnet8": 4, "resnet20": 4}  # pixels high and wide


def build(name: str, framework: str, *, input_shape: tuple[int, ...], num_outputs: int) -> tuple[Any, str]:
    """A module of a framework, and one line that describes it.

    Args:
        name: ``gn_cnn`` (convolutions of 16, 32 and 64 channels with group norm), ``lenet``, ``vgg`` (twice as many
            convolutions and a hidden layer), ``resnet8`` or ``resnet20`` (residual, with group norm).
        framework: ``torch`` or ``jax``.
        input_shape: of one example.
        num_outputs: of the network.

    Raises:
        SettingError: the examples are not images, or too small.
    """
    least = SMALLEST[name]
    if len(input_shape) != 3 or min(input_shape[:2]) < least:
        expected = f"linear or mlp: these examples are not images of {least} x {least} or more"
        raise SettingError("model", name, expected, "model=mlp")
    networks = import_module(f"simulations.models.vision_{framework}")
    size = "x".join(map(str, input_shape))
    if name == "gn_cnn":
        return networks.PlainNet(input_shape, ((16,), (32,), (64,)), (), num_outputs), f"gn_cnn {size}-16-32-64"
    if name == "vgg":
        stages = ((16, 16), (32, 32), (64, 64))
        return networks.PlainNet(input_shape, stages, (128,), num_outputs), f"vgg {size}-16x2-32x2-64x2-128"
    if name == "lenet":
        return networks.LeNet(input_shape, num_outputs), f"lenet {size}-6-16-120-84"
    return networks.ResNet(input_shape, 1 if name == "resnet8" else 3, num_outputs), f"{name} {size}-16-32-64"
