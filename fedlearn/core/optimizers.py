"""Name the optimizers that have the same arithmetic in every framework, with their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedlearn.core.named_option import option_name, option_values, refuse_unknown_values
from fedlearn.errors import is_number, require

# name -> values with their defaults, as in torch.optim
PORTABLE_OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"nesterov": False},
    "adam": {"betas": [0.9, 0.999], "eps": 1e-8},
    "adamw": {"betas": [0.9, 0.999], "eps": 1e-8},
    "adagrad": {"eps": 1e-10},
    "rmsprop": {"alpha": 0.99, "eps": 1e-8},
}


def is_portable(optimizer: Any) -> bool:
    """Return whether an optimizer has the same arithmetic in every framework."""
    return option_name(optimizer) in PORTABLE_OPTIMIZERS


def optimizer_values(optimizer: Any) -> dict[str, Any]:
    """Return all values of a portable optimizer, with its defaults."""
    return {**PORTABLE_OPTIMIZERS[str(option_name(optimizer))], **option_values(optimizer)}


STATE_PREFIX = "optimizer."  # names of the optimizer state in a client state
STEPS = f"{STATE_PREFIX}steps"  # number of steps so far, a vector of length 1
STATE_POLICIES = ("reset", "keep", "average")
_STATES = {"adam": ("first", "second"), "adamw": ("first", "second"), "adagrad": ("total",), "rmsprop": ("mean",)}


def state_names(local: Any) -> tuple[str, ...]:
    """Return the names of the vectors ``(D,)`` that a client keeps between rounds, without `STEPS`.

    Args:
        local: settings of local training. The result is empty if the optimizer has no state or forgets it.
    """
    if local.optimizer_state == "reset":
        return ()
    velocity = ("velocity",) if local.momentum else ()
    return tuple(f"{STATE_PREFIX}{name}" for name in _STATES.get(str(option_name(local.optimizer)), velocity))


def check_state_policy(local: Any) -> None:
    """Check the setting ``optimizer_state``.

    Raises:
        SettingError: The value is unknown, or the optimizer is not equal in all frameworks and its state must stay.
    """
    policy, known = local.optimizer_state, local.optimizer_state in STATE_POLICIES
    require(known, "optimizer_state", policy, f"one of {', '.join(STATE_POLICIES)}", "optimizer_state=keep")
    expected = f"reset, because only the state of {', '.join(PORTABLE_OPTIMIZERS)} can be kept"
    can_keep = policy == "reset" or is_portable(local.optimizer)
    require(can_keep, "optimizer_state", policy, expected, "optimizer=adam")


def check_optimizer(optimizer: Any, *, momentum: float) -> None:
    """Check the values of a portable optimizer. The trainer checks the values of all others.

    Args:
        optimizer: name, `NamedOption` or function.
        momentum: momentum of the settings, which only ``sgd`` has.

    Raises:
        SettingError: A value is unknown or out of range.
    """
    name = option_name(optimizer)
    expected = f"0, because {name or 'your optimizer'} has no setting momentum"
    require(not momentum or name == "sgd", "momentum", momentum, expected, "optimizer=sgd")
    if not is_portable(optimizer):
        return
    refuse_unknown_values(optimizer, PORTABLE_OPTIMIZERS[str(name)], "optimizer")
    values = optimizer_values(optimizer)
    for key, value in values.items():
        is_valid, expected, example = _CHECKS[key]
        require(is_valid(value), f"optimizer.{key}", value, expected, f"'optimizer={{name:{name},{key}:{example}}}'")
    has_momentum = not values.get("nesterov") or momentum > 0
    require(has_momentum, "momentum", momentum, "above 0 with optimizer.nesterov=true", "momentum=0.9")


def _is_share(value: Any) -> bool:
    return is_number(value, at_least=0, below=1)


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "nesterov": (lambda value: isinstance(value, bool), "true or false", "true"),
    "betas": (
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_share, value)),
        "two numbers in [0, 1)",
        "[0.9,0.999]",
    ),
    "eps": (lambda value: is_number(value, at_least=0) and 0 < value < 1, "a number between 0 and 1", "1e-8"),
    "alpha": (_is_share, "a number in [0, 1)", "0.99"),
}
