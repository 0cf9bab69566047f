"""Train and evaluate flax models with JAX."""

from fedlearn.trainers.jax.trainer import JaxTrainer

__all__ = ["JaxTrainer"]
