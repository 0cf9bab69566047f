"""State the default settings of local training for a scenario, before any data are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar


@dataclass(frozen=True, kw_only=True)
class LocalDefaults:
    """Hold the values that replace ``auto`` in the settings of local training.

    Args:
        optimizer: default optimizer.
        learning_rates: learning rate of each optimizer; other optimizers take the rate of ``adam``.
        max_grad_norm: bound on the gradient of each step; None for no bound.
        reason: data and model that the values fit, for the header, e.g. ``mlp of texts``.
    """

    optimizer: str = "sgd"
    learning_rates: Mapping[str, float] = field(default_factory=lambda: {"sgd": 0.1, "adam": 0.001})
    max_grad_norm: float | None = None
    reason: str = "any model"


Declared = Callable[[Mapping[str, Any]], LocalDefaults]  # from the settings of a scenario
Builder = TypeVar("Builder", bound=Callable[..., Any])


def declares_local_defaults(declared: Declared) -> Callable[[Builder], Builder]:
    """Return a decorator that states the default settings of local training of a scenario builder."""

    def state(builder: Builder) -> Builder:
        vars(builder).update(local_defaults=declared)
        return builder

    return state


def local_defaults(builder: Any, settings: Mapping[str, Any]) -> LocalDefaults:
    """Return the defaults that a scenario builder declares for its settings, or the defaults of the library."""
    declared: Declared | None = getattr(builder, "local_defaults", None)
    return LocalDefaults() if declared is None else declared(settings)
