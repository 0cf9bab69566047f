"""Server optimizers: they turn the aggregated update into the step of the global model.

Shapes: D parameters laid flat.

The optimizers use array-API arithmetic. So they run on the device of the update and need neither torch nor JAX. The
tests compare them with optax. `from_optax` wraps any other optimizer of optax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from fedlearn.algorithm.transforms import Context, Transform
from fedlearn.core.arrays import as_numpy, asarray_like
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array, State
from fedlearn.errors import MissingExtra, is_number, require


def sgd(learning_rate: float = 1.0, *, momentum: float = 0.0, nesterov: bool = False) -> Transform:
    """Return server SGD with heavy-ball momentum: ``v = momentum v + update; step = learning_rate v``.

    With ``nesterov``, the step is ``learning_rate (update + momentum v)``. It equals ``torch.optim.SGD``, and
    ``optax.sgd(learning_rate, momentum)``.
    """
    require(is_number(momentum, at_least=0, below=1), "momentum", momentum, "in [0, 1)", "momentum=0.9")
    _require_rate(learning_rate)
    if not momentum:
        return Transform(update=lambda update_D, state, context: (_scaled(update_D, learning_rate), state))

    def update(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        v_D = momentum * asarray_like(state["v"], update_D) + update_D
        return learning_rate * (update_D + momentum * v_D if nesterov else v_D), {"v": v_D}

    return Transform(init=lambda layout: {"v": zeros(layout)}, update=update)


def _scaled(update_D: Array, learning_rate: float) -> Array:
    return update_D if learning_rate == 1 else learning_rate * update_D


SecondMoment = Callable[[Array, Array], Array]  # (v, update) -> v


def adaptive(second_moment: SecondMoment, *, learning_rate: float, beta1: float, tau: float) -> Transform:
    """Return the adaptive server optimizer of FedOpt.

    ``m = beta1 m + (1 - beta1) update;  v = second_moment(v, update);  step = learning_rate m / (sqrt(v) + tau)``

    There is no bias correction, and ``v`` starts at ``tau^2``.

    Reference: Reddi et al., *Adaptive Federated Optimization*, ICLR 2021, arXiv:2003.00295, Algorithm 2.
    """
    _require_rate(learning_rate)
    require(is_number(beta1, at_least=0, below=1), "beta1", beta1, "in [0, 1)", "beta1=0.9")
    require(is_number(tau, at_least=0) and tau > 0, "tau", tau, "a number > 0", "tau=0.001")

    def init(layout: Layout) -> State:
        return {"m": zeros(layout), "v": zeros(layout) + np.float32(tau**2)}

    def update(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        xp = array_namespace(update_D)
        m_D = beta1 * asarray_like(state["m"], update_D) + (1 - beta1) * update_D
        v_D = second_moment(asarray_like(state["v"], update_D), update_D)
        return learning_rate * m_D / (xp.sqrt(v_D) + tau), {"m": m_D, "v": v_D}

    return Transform(init=init, update=update)


def from_optax(optimizer: Any) -> Transform:
    """Return an optax optimizer as a server optimizer on the flat vector, e.g. ``from_optax(optax.yogi(1e-2))``.

    The optimizer gets minus the update as gradient.

    Raises:
        MissingExtra: JAX is not installed.
    """
    try:
        import jax
    except ImportError as missing:
        raise MissingExtra("an optax server optimizer", "jax") from missing

    def init(layout: Layout) -> State:
        return {f"{i}": as_numpy(leaf) for i, leaf in enumerate(jax.tree.leaves(optimizer.init(zeros(layout))))}

    def update(update_D: Array, state: State, context: Context) -> tuple[Array, State]:
        gradient_D = -as_numpy(update_D)
        treedef: Any = jax.tree.structure(optimizer.init(gradient_D))
        optax_state = jax.tree.unflatten(treedef, [state[f"{i}"] for i in range(treedef.num_leaves)])
        step_D, optax_state = optimizer.update(gradient_D, optax_state, None)
        leaves = jax.tree.leaves(optax_state)
        return asarray_like(step_D, update_D), {f"{i}": as_numpy(leaf) for i, leaf in enumerate(leaves)}

    return Transform(init=init, update=update)


def zeros(layout: Layout) -> np.ndarray:
    """Return ``D`` float32 zeros, the usual initial state of a server optimizer."""
    return np.zeros(layout.num_parameters, np.float32)


def _require_rate(learning_rate: float) -> None:
    is_valid = is_number(learning_rate, at_least=0)
    require(is_valid, "learning_rate", learning_rate, "a number >= 0", "learning_rate=0.1")
