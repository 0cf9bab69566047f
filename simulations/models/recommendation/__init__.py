"""Trainers of recommenders: twins by name, in either framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout, default_initial_parameters
from fedlearn.loop.protocols import Trainer
from simulations.models.twins import build_named_trainer

MODELS = ("mf", "ncf")
ITEM_INIT_STD = 0.1  # of an item's factors before anybody has told of it


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
    """A trainer of a recommender, and one line that describes it.

    Args:
        model: ``mf``, ``ncf``, or a module of your own that takes ``(B,)`` item numbers; what it knows of its user is
            called ``user.*``.
        data: for the task.
        num_items: item numbers run from 0.
        num_factors: numbers that describe a user or an item.
        global_mean: a score that says nothing.
        framework: ``torch``, ``jax`` or ``mixed``.
        device: where to compute.
    """
    sizes = (num_items, num_factors, global_mean)
    how = {"framework": framework, "device": device}
    initial = initial_params if isinstance(model, str) else None
    made = build_named_trainer("recommendation", model, MODELS, sizes, data, input_shape=(), initial=initial, **how)
    name = model if isinstance(model, str) else type(model).__name__
    return made, f"{name}, {num_items} items, {num_factors} factors"


def initial_params(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Initial parameters: nothing is known of the user, items differ a little, affine maps are as usual."""
    tensors = layout.unpack(default_initial_parameters(layout, rng))
    for name, tensor in tensors.items():
        if name.startswith("user.") or name == "item_bias.weight":
            tensor[:] = 0
        elif name == "items.weight":
            tensor[:] = rng.normal(0, ITEM_INIT_STD, tensor.shape)
    return layout.pack(tensors)
