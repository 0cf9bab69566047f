"""The large model of `simulations.benchmarks.large` in JAX."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from fedlearn.trainers.jax import JaxTrainer


def build_trainer(width: int, num_inputs: int, num_classes: int) -> JaxTrainer:
    """Return the trainer of a network with two hidden layers."""
    layers: list[Any] = [nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(num_classes)]
    return JaxTrainer(nn.Sequential(layers), task="multiclass", input_shape=(num_inputs,))
