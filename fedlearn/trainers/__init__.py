"""Trainers: local training of a model in PyTorch or JAX, and wrappers around trainers."""

from typing import TYPE_CHECKING

from fedlearn.core.lazy_names import LazyName, lazy_names
from fedlearn.trainers.base import BaseTrainer, LocalResult, initial_parameters, require_plain_training
from fedlearn.trainers.batching import batch_plans, rounds_of

if TYPE_CHECKING:
    from fedlearn.trainers.augmentation import Augmentation, AugmentedTrainer
    from fedlearn.trainers.jax import JaxTrainer
    from fedlearn.trainers.mixed import MixedTrainer
    from fedlearn.trainers.torch import TorchTrainer
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Augmentation": LazyName("fedlearn.trainers.augmentation"),
            "AugmentedTrainer": LazyName("fedlearn.trainers.augmentation"),
            "JaxTrainer": LazyName("fedlearn.trainers.jax", "jax"),
            "MixedTrainer": LazyName("fedlearn.trainers.mixed"),
            "TorchTrainer": LazyName("fedlearn.trainers.torch", "torch"),
        },
    )

__all__ = [
    "Augmentation",
    "AugmentedTrainer",
    "BaseTrainer",
    "JaxTrainer",
    "LocalResult",
    "MixedTrainer",
    "TorchTrainer",
    "batch_plans",
    "initial_parameters",
    "require_plain_training",
    "rounds_of",
]
