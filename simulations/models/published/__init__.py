"""Networks of published experiments, as lists of layers. Both frameworks build them from the same lists.

A ReLU follows each layer with weights except the last layer. ReLU and maxima have kinks, so the two frameworks differ
by more than rounding after many steps; see `simulations.models`. These networks are for comparisons with published
results.

Shapes: H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fedlearn.errors import SettingError


@dataclass(frozen=True)
class Standardize:
    """Subtract ``mean`` from each input, and divide by ``deviation``."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Convolution:
    """A convolution with square kernels of ``size`` pixels, then a ReLU."""

    channels: int
    size: int
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True)
class MaxPool:
    """The maximum of squares of ``size`` pixels."""

    size: int = 2
    stride: int = 2


@dataclass(frozen=True)
class Dense:
    """An affine map of all values, then a ReLU."""

    width: int


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability ``rate``, in training only."""

    rate: float


Layer = Standardize | Convolution | MaxPool | Dense | Dropout

NETWORKS: Mapping[str, Sequence[Layer]] = {
    # McMahan et al., AISTATS 2017, arXiv:1602.05629: 199,210 and 1,663,370 parameters
    "mcmahan_2nn": (Dense(200), Dense(200)),
    "mcmahan_cnn": (Convolution(32, 5, padding=2), MaxPool(), Convolution(64, 5, padding=2), MaxPool(), Dense(512)),
    # examples/mnist.py of Opacus: 26,010 parameters
    "opacus_cnn": (
        Standardize(0.1307, 0.3081),
        Convolution(16, 8, stride=2, padding=3),
        MaxPool(2, 1),
        Convolution(32, 4, stride=2),
        MaxPool(2, 1),
        Dense(32),
    ),
    # model "simple-cnn" of NIID-Bench, Li et al., ICDE 2022, arXiv:2102.02079: 44,426 parameters
    "niid_bench_cnn": (Convolution(6, 5), MaxPool(), Convolution(16, 5), MaxPool(), Dense(120), Dense(84)),
    # FedAvgCNN of PFLlib, Zhang et al., JMLR 26(50), 2025, arXiv:2312.04992: 582,026 parameters
    "pfllib_cnn": (
        Standardize(0.5, 0.5),
        Convolution(32, 5),
        MaxPool(),
        Convolution(64, 5),
        MaxPool(),
        Dense(512),
    ),
    # model "simple_cnn" of the benchmarks of pfl-research, Granqvist et al., NeurIPS 2024, arXiv:2404.06430
    "pfl_research_cnn": (
        Convolution(32, 3),
        Convolution(64, 3),
        MaxPool(),
        Dropout(0.25),
        Dense(128),
        Dropout(0.5),
    ),
}


def build_published_network(
    name: str, framework: str, *, input_shape: Sequence[int], num_outputs: int
) -> tuple[Any, str]:
    """Build a network by name, and describe it in one line.

    Args:
        name: name in `NETWORKS`.
        framework: ``torch`` or ``jax``.
        input_shape: shape of one example: (H, W, C), or any shape for networks without convolutions.
        num_outputs: number of outputs of the network.

    Raises:
        SettingError: The examples are not images, or the images are too small.
    """
    layers = NETWORKS[name]
    is_image = len(input_shape) == 3 or not any(isinstance(layer, Convolution) for layer in layers)
    if not is_image or _smallest_side(layers, input_shape) < 1:
        raise SettingError("model", name, "linear or mlp: the examples are not images, or too small", "model=mlp")
    networks = import_module(f"simulations.models.published.{framework}")
    size = "x".join(map(str, input_shape))
    shapes = zip(layers, sizes_after(layers, input_shape)[1:], strict=True)
    widths = [shape[-1] for layer, shape in shapes if isinstance(layer, Convolution | Dense)]
    line = "-".join(map(str, [f"{name} {size}", *widths, num_outputs]))
    return networks.PublishedNetwork(tuple(layers), tuple(input_shape), num_outputs), line


def sizes_after(layers: Sequence[Layer], input_shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the shape of an example before the first layer, and after each layer.

    >>> sizes_after(NETWORKS["niid_bench_cnn"], (28, 28, 1))[-3:]
    [(4, 4, 16), (120,), (84,)]
    """
    shapes = [tuple(input_shape)]
    for layer in layers:
        shape = shapes[-1]
        if isinstance(layer, Convolution):
            height, width = ((side + 2 * layer.padding - layer.size) // layer.stride + 1 for side in shape[:2])
            shape = (height, width, layer.channels)
        elif isinstance(layer, MaxPool):
            height, width = ((side - layer.size) // layer.stride + 1 for side in shape[:2])
            shape = (height, width, shape[2])
        elif isinstance(layer, Dense):
            shape = (layer.width,)
        shapes.append(shape)
    return shapes


def _smallest_side(layers: Sequence[Layer], input_shape: Sequence[int]) -> int:
    """Return the smallest side of the maps before and after all layers. It is below 1 if the images are too small."""
    return min(side for shape in sizes_after(layers, input_shape) for side in shape)
