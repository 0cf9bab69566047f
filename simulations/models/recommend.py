"""Trainers of recommenders: twins by name, in either framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlearn.data.federated import FederatedData
from fedlearn.layout import Layout, default_initial
from fedlearn.trainers.base import Trainer
from simulations.models.twins import twins

NAMES = ("mf", "ncf")
SPREAD = 0.1  # of an item's factors before anybody has told of it


def recommender(
    model: Any,
    data: FederatedData,
    *,
    num_items: int,
    factors: int,
    centre: float,
    framework: str = "torch",
    device: str = "cpu",
) -> tuple[Trainer, str]:
    """A trainer of a recommender, and one line that describes it.

    Args:
        model: ``mf``, ``ncf``, or a module of your own that takes ``(B,)`` item numbers; what it knows of its user is
            called ``user.*``.
        data: for the task.
        num_items: item numbers run from 0.
        factors: numbers that describe a user or an item.
        centre: a score that says nothing.
        framework: ``torch``, ``jax`` or ``mixed``.
        device: where to compute.
    """
    sizes = (num_items, factors, centre)
    how = {"framework": framework, "device": device}
    made = twins("recommend", model, NAMES, sizes, data, shape=(), initial=unknown_user, **how)
    name = model if isinstance(model, str) else type(model).__name__
    return made, f"{name}, {num_items} items, {factors} factors"


def unknown_user(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Initial parameters: nothing is known of the user, items differ a little, affine maps are as usual."""
    tensors = layout.unpack(default_initial(layout, rng))
    for name, tensor in tensors.items():
        if name.startswith("user.") or name == "item_bias.weight":
            tensor[:] = 0
        elif name == "items.weight":
            tensor[:] = rng.normal(0, SPREAD, tensor.shape)
    return layout.pack(tensors)
