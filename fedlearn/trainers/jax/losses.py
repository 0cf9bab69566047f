"""Losses of the tasks in JAX, one value per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from fedlearn.core.tasks import Task

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (outputs_BC, y_B) -> loss_B


def _logistic(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(outputs[:, 0], y)


def _cox(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Return the negative log partial likelihood of each event; its risk sets are the batch. See `core.tasks.survival`.

    The memory grows with the square of the batch.
    """
    score, time, is_event = outputs[:, 0], y[:, 0], y[:, 1] > 0
    rows = jnp.arange(len(score))
    is_real = (time > 0) | is_event  # a row of padding has time 0 and no event
    at_risk = ((time >= time[:, None]) & is_real) | (rows == rows[:, None])
    tied = (time == time[:, None]) & is_event
    log_risk = jax.nn.logsumexp(jnp.where(at_risk, score, -jnp.inf), axis=1)
    tied_share = jnp.where(tied, jnp.exp(jnp.where(tied, score - log_risk[:, None], 0.0)), 0.0).sum(axis=1)
    place = (tied & (rows < rows[:, None])).sum(axis=1) / jnp.maximum(tied.sum(axis=1), 1)
    loss = log_risk + jnp.log1p(-place * jnp.where(is_event, tied_share, 0.0)) - score
    return jnp.where(is_event, loss, 0.0)


def _position_loss(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean loss over the positions of each example, for outputs ``(B, ..., C)``; -1 is padding."""
    is_real = y >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.where(is_real, y, 0))
    axes = tuple(range(1, y.ndim))
    return jnp.where(is_real, losses, 0.0).sum(axis=axes) / jnp.maximum(is_real.sum(axis=axes), 1)


LOSSES: Mapping[str, Loss] = {
    "binary": _logistic,
    "ranking": _logistic,
    "multiclass": optax.softmax_cross_entropy_with_integer_labels,
    "regression": lambda outputs, y: (outputs[:, 0] - y) ** 2,
    "multilabel": lambda outputs, y: optax.sigmoid_binary_cross_entropy(outputs, y).mean(axis=1),
    "survival": _cox,
    "segmentation": lambda outputs, y: _position_loss(jnp.moveaxis(outputs, 1, -1), y),
    "token_classification": _position_loss,
    "causal_lm": lambda outputs, y: outputs[:, 0] / jnp.maximum(outputs[:, 2], 1),
}


def loss_of(task: Task) -> Loss:
    """Return the loss of a task.

    Raises:
        SettingError: The task of the user has no loss for JAX.
    """
    return LOSSES[task.name] if task.loss is None and task.name in LOSSES else task.loss_for("jax")
