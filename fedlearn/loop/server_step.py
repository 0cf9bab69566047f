"""Apply the server halves of the stages and the server optimizer to the aggregate of a round.

Shapes: D parameters, S parameters that clients share with the server.
"""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace

from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.layout import RUNNING_VARIANCE, Layout
from fedlearn.core.records import Array, ServerState, State
from fedlearn.errors import FedlearnError


def server_step(
    strategy: Strategy, state: ServerState, update_D: Array, context: Context, layout: Layout
) -> tuple[Array, State, tuple[State, ...]]:
    """Apply the server halves of the stages in reverse order, then the server optimizer. Return model and states.

    The global model keeps its values for personal and frozen parameters, because clients do not send them. With
    `Strategy.merges_adapters`, the aggregate has all parameters.

    Args:
        strategy: the algorithm.
        state: server state before the round.
        update_D: the aggregate of the shared parameters.
        context: values of the round for stages and optimizer.
        layout: layout of the model.

    Returns:
        The new parameters ``(D,)``, the state of the server optimizer, and the states of the stages.

    Raises:
        FedlearnError: A running variance of the new model is negative.
    """
    stages = list(state.stages)
    for i in reversed(range(len(strategy.stages))):
        update_D, stages[i] = strategy.stages[i].server.update(update_D, stages[i], context)
    unshared = strategy.local.unshared_parameters
    if unshared and not strategy.merges_adapters:
        update_D = _pad_with_zeros(update_D, layout.positions(unshared), layout.num_parameters)
    step_D, server = strategy.server.update(update_D, state.server, context)
    if strategy.buffers == "average":
        step_D = _average_buffers(step_D, update_D, layout)
    params_D = asarray_like(state.params_D, step_D) + step_D
    _refuse_negative_variances(params_D, layout)
    return params_D, server, tuple(stages)


def _average_buffers(step_D: Array, update_D: Array, layout: Layout) -> Array:
    """Return the step, with the aggregate itself for buffers: they have no gradient for the server optimizer."""
    is_buffer_D = np.zeros(layout.num_parameters, bool)
    is_buffer_D[layout.positions(layout.buffers)] = True
    return array_namespace(step_D).where(asarray_like(is_buffer_D, step_D), asarray_like(update_D, step_D), step_D)


def _refuse_negative_variances(params_D: Array, layout: Layout) -> None:
    names = [name for name in layout.buffers if name.endswith(RUNNING_VARIANCE)]
    if names and (as_numpy(params_D)[layout.positions(tuple(names))] < 0).any():
        raise FedlearnError(
            "a running variance fell below zero: this strategy or its codec does not average the batch statistics\n"
            "  try       buffers=local"
        )


def _pad_with_zeros(update_S: Array, unshared: np.ndarray, size: int) -> Array:
    """Return an update of all parameters ``(D,)``, with zeros at the positions that clients do not share."""
    xp = array_namespace(update_S)
    source_D = np.full(size, update_S.shape[0])
    source_D[np.delete(np.arange(size), unshared)] = np.arange(update_S.shape[0])
    padded = xp.concat([update_S, xp.zeros_like(update_S[:1])])
    return xp.take(padded, asarray_like(source_D, padded), axis=0)
