"""Train JAX models."""

from fedlearn.trainers.jax.trainer import JaxTrainer

__all__ = ["JaxTrainer"]
