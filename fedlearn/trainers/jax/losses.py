"""Losses of the tasks in JAX, one value per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import optax

from fedlearn.core.tasks import Task

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (outputs_BC, y_B) -> loss_B


def _logistic(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(outputs[:, 0], y)


LOSSES: Mapping[str, Loss] = {
    "binary": _logistic,
    "ranking": _logistic,
    "multiclass": optax.softmax_cross_entropy_with_integer_labels,
    "regression": lambda outputs, y: (outputs[:, 0] - y) ** 2,
}


def loss_of(task: Task) -> Loss:
    """Return the loss of a task.

    Raises:
        SettingError: The task of the user has no loss for JAX.
    """
    return LOSSES[task.name] if task.loss is None and task.name in LOSSES else task.loss_for("jax")
