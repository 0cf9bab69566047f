"""Build trainers for recommender models, in both frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout, default_initial_parameters
from fedlearn.loop.protocols import Trainer
from simulations.models.twins import build_named_trainer

MODELS = ("mf", "ncf")
ITEM_INIT_STD = 0.1  # standard deviation of the initial item factors


def build_recommender(
    model: Any,
    data: FederatedData,
    *,
    num_items: int,
    num_factors: int,
    global_mean: float,
    framework: str = "torch",
    device: str = "cpu",
) -> tuple[Trainer, str]:
    """Build a trainer for a recommender model, and describe the model in one line.

    Args:
        model: ``mf``, ``ncf``, or a module with inputs ``(B,)``, the item numbers. The names of its personal
            parameters start with ``user.``.
        data: data set that defines the task.
        num_items: number of items; item numbers start at 0.
        num_factors: number of factors of a user or an item.
        global_mean: score of an unknown user and an unknown item.
        framework: ``torch`` (default), ``jax`` or ``mixed``.
        device: device for the computation.
    """
    sizes = (num_items, num_factors, global_mean)
    options = {"framework": framework, "device": device}
    initial = initial_params if isinstance(model, str) else None
    trainer = build_named_trainer(
        "recommendation", model, MODELS, sizes, data, input_shape=(), initial=initial, **options
    )
    name = model if isinstance(model, str) else type(model).__name__
    return trainer, f"{name}, {num_items} items, {num_factors} factors"


def initial_params(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Draw the initial parameters.

    User parameters and item biases are zero. Item factors are normal with standard deviation `ITEM_INIT_STD`. Affine
    maps have their default initial values.
    """
    tensors = layout.unpack(default_initial_parameters(layout, rng))
    for name, tensor in tensors.items():
        if name.startswith("user.") or name == "item_bias.weight":
            tensor[:] = 0
        elif name == "items.weight":
            tensor[:] = rng.normal(0, ITEM_INIT_STD, tensor.shape)
    return layout.pack(tensors)
