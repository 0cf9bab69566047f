"""Build the optimizers of local training in JAX.

Shapes: S local steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedlearn.core.named_option import describe_option, option_name, option_values
from fedlearn.core.optimizers import is_portable, optimizer_values
from fedlearn.core.records import LocalSettings
from fedlearn.errors import SettingError, did_you_mean, require

Optimizer = Any  # optax.GradientTransformation, whose package has no types
NOT_FOR_GRADIENTS = ("lbfgs",)  # needs values of the loss


def optax_optimizers() -> Mapping[str, Callable[..., Optimizer]]:
    """Return the optimizers of optax by their names. Each takes the learning rate first."""
    known = {}
    for name in dir(optax):
        builder = getattr(optax, name)
        is_candidate = inspect.isfunction(builder) and not name.startswith(("_", "scale_by_"))
        if is_candidate and next(iter(inspect.signature(builder).parameters), "") == "learning_rate":
            known[name] = builder
    return {name: builder for name, builder in known.items() if name not in NOT_FOR_GRADIENTS}


def check_optimizer(local: LocalSettings) -> None:
    """Check that optax has the optimizer, with these values.

    Raises:
        SettingError: The name is unknown, or a value is unknown or out of range.
    """
    build_optimizer(local, None)


def build_optimizer(local: LocalSettings, rates_S: jax.Array | None) -> Optimizer:
    """Return the optimizer with a new state.

    Args:
        local: settings of local training.
        rates_S: learning rate of each step; None for the constant rate of the settings.

    Raises:
        SettingError: See `check_optimizer`.
    """
    rate = local.learning_rate if rates_S is None else lambda count: rates_S[count]
    if is_portable(local.optimizer):
        return optax.chain(*_direction(local), optax.scale_by_learning_rate(rate))
    name, known = option_name(local.optimizer), optax_optimizers()
    if name is None:
        builder, values = local.optimizer, {}
    else:
        near = did_you_mean(name, known) or "adam"
        require(name in known, "local.optimizer", name, f"one of {', '.join(known)}", f"local.optimizer={near}")
        builder, values = known[name], option_values(local.optimizer)
    if local.weight_decay:
        values = {**values, "weight_decay": local.weight_decay}
    try:
        optimizer = builder(rate, **values)
    except (TypeError, ValueError) as error:
        shown, expected = describe_option(local.optimizer), f"values that optax accepts ({str(error).splitlines()[0]})"
        raise SettingError("local.optimizer", shown, expected, "local.optimizer=adam") from error
    is_optimizer = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    expected = f"a function that returns an optax optimizer; it returned {type(optimizer).__name__}"
    require(is_optimizer, "local.optimizer", describe_option(local.optimizer), expected, "local.optimizer=adam")
    return optimizer


def load_state(state: Any, vectors: Mapping[str, Any], steps: jax.Array) -> Any:
    """Return the state of a portable optimizer with the vectors that a client has kept.

    Args:
        state: new state of `build_optimizer`.
        vectors: name -> parameters of the vector.
        steps: number of steps so far.
    """

    def load(part: Any) -> Any:
        if isinstance(part, optax.ScaleByAdamState):
            return part._replace(count=steps.astype(part.count.dtype), mu=vectors["first"], nu=vectors["second"])
        field = _FIELDS.get(type(part))
        return part if field is None else part._replace(**{field[0]: vectors[field[1]]})

    return tuple(load(part) for part in state)


def save_state(state: Any) -> tuple[dict[str, Any], jax.Array]:
    """Return the vectors of the state of a portable optimizer, and the number of its steps (0 if it counts none)."""
    vectors, steps = {}, jnp.zeros((), jnp.float32)
    for part in state:
        if isinstance(part, optax.ScaleByAdamState):
            vectors, steps = {"first": part.mu, "second": part.nu}, part.count.astype(jnp.float32)
        elif type(part) in _FIELDS:
            field, name = _FIELDS[type(part)]
            vectors[name] = getattr(part, field)
    return vectors, steps


def clip_gradient(max_norm: float, gradient: Any) -> Any:
    """Scale the gradient of one client to an L2 norm of at most ``max_norm``."""
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    factor = jnp.minimum(max_norm / norm, 1.0)
    return jax.tree.map(lambda leaf: leaf * factor, gradient)


def _direction(local: LocalSettings) -> list[Optimizer]:
    """Return the parts of a portable optimizer before the multiplication by the learning rate, as in torch.optim."""
    name, values = option_name(local.optimizer), optimizer_values(local.optimizer)
    decay = optax.add_decayed_weights(local.weight_decay)
    if name == "sgd":
        return [decay, *([optax.trace(local.momentum, nesterov=values["nesterov"])] if local.momentum else [])]
    if name == "adagrad":
        return [decay, _scale_by_root_of_sum(values["eps"])]
    if name == "rmsprop":
        return [decay, optax.scale_by_rms(values["alpha"], values["eps"], eps_in_sqrt=False)]
    b1, b2 = values["betas"]
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=values["eps"])
    return [adam, decay] if name == "adamw" else [decay, adam]


def _scale_by_root_of_sum(eps: float) -> Optimizer:
    """Return AdaGrad as in torch: ``g / (sqrt(sum of g^2) + eps)``. Optax adds ``eps`` inside of the root."""

    def init(params: Any) -> _SumState:
        return _SumState(jax.tree.map(jnp.zeros_like, params))

    def update(gradient: Any, state: _SumState, params: Any = None) -> tuple[Any, _SumState]:
        total = jax.tree.map(lambda s, g: s + g * g, state.total, gradient)
        return jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), gradient, total), _SumState(total)

    return optax.GradientTransformation(init, update)


class _SumState(NamedTuple):
    total: Any


_FIELDS: Mapping[type, tuple[str, str]] = {  # kind of state -> its field, and the name of the vector
    optax.TraceState: ("trace", "velocity"),
    optax.ScaleByRmsState: ("nu", "mean"),
    _SumState: ("total", "total"),
}
