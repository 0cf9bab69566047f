"""Replace ``auto`` in the settings of local training by the defaults of the scenario."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.named_option import describe_option, option_name
from fedlearn.core.records import LocalSettings
from fedlearn.loop.local_defaults import LocalDefaults

AUTO = "auto"
AUTO_SETTINGS = ("optimizer", "learning_rate", "max_grad_norm")


def automatic_settings(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the settings of local training with the value ``auto``."""
    return tuple(name for name in AUTO_SETTINGS if settings.get(name) == AUTO)


def resolve_auto(
    settings: Mapping[str, Any], defaults: LocalDefaults, *, rule: LocalRule, clips_examples: bool
) -> dict[str, Any]:
    """Return the settings with a value in place of each ``auto``.

    Momentum, and a strategy that requires plain SGD, select SGD. The learning rate follows from the optimizer.

    Args:
        settings: group ``local`` of the configuration, as plain values.
        defaults: defaults of the scenario.
        rule: local rule of the strategy.
        clips_examples: whether DP-SGD clips the gradient of each example, which excludes a bound on the gradient.
    """
    resolved, automatic = dict(settings), automatic_settings(settings)
    if "optimizer" in automatic:
        resolved["optimizer"] = "sgd" if rule.requires_sgd or settings.get("momentum") else defaults.optimizer
    if "learning_rate" in automatic:
        optimizer, rates = resolved.get("optimizer", "sgd"), defaults.learning_rates
        name = None if isinstance(optimizer, Mapping) and "name" not in optimizer else option_name(optimizer)
        resolved["learning_rate"] = rates.get(str(name), rates["adam"])
    if "max_grad_norm" in automatic:
        resolved["max_grad_norm"] = None if clips_examples else defaults.max_grad_norm
    return resolved


def describe_training(local: LocalSettings, automatic: tuple[str, ...], defaults: LocalDefaults) -> str:
    """Return the optimizer and its settings for the header, if a default of the scenario determines one of them.

    Args:
        local: settings of local training.
        automatic: names of the settings with a default of the scenario.
        defaults: defaults of the scenario.
    """
    if not automatic:
        return ""
    parts = [describe_option(local.optimizer), f"learning rate {local.learning_rate:g}"]
    parts += [f"gradient norm at most {local.max_grad_norm:g}"] if local.max_grad_norm is not None else []
    return f"{', '.join(parts)} (defaults for {defaults.reason}: {', '.join(f'local.{name}' for name in automatic)})"
