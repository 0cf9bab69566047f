"""Check the settings of local training that change the loss or the gradient."""

from __future__ import annotations

from typing import Any

from fedlearn.errors import is_count, is_number, require

BALANCED = "balanced"
PRECISIONS = ("float32", "bfloat16")


# settings that change the loss or the passes of training -> their defaults
LOSS_DEFAULTS = {"micro_batch_size": None, "class_weights": None, "label_smoothing": 0.0, "precision": "float32"}


def show_default(value: Any) -> str:
    """Return the default of a setting as it is typed."""
    return "null" if value is None else str(value).removesuffix(".0")


def as_class_weights(value: Any) -> Any:
    """Return class weights as a tuple of floats, ``balanced``, or None.

    Raises:
        SettingError: The value has another type, a weight is negative, or all weights are 0.
    """
    if value is None or value == BALANCED:
        return value
    is_list = isinstance(value, list | tuple) and len(value) >= 2 and all(is_number(v, at_least=0) for v in value)
    expected = "null, balanced, or a list with a number >= 0 for each class"
    require(is_list and any(value), "class_weights", value, expected, "class_weights=balanced")
    return tuple(map(float, value))


def check_gradient_settings(local: Any) -> None:
    """Check the bound on gradients, the micro batches and the changes of the loss, also together with DP-SGD.

    Raises:
        SettingError: A value is out of range, or DP-SGD excludes it.
    """
    bound, micro, smoothing = local.max_grad_norm, local.micro_batch_size, local.label_smoothing
    is_bound = bound is None or (is_number(bound, at_least=0) and bound > 0)
    require(is_bound, "max_grad_norm", bound, "null, or a number > 0", "max_grad_norm=1.0")
    is_valid = micro is None or is_count(micro)
    require(is_valid, "micro_batch_size", micro, "null, or a whole number >= 1", "micro_batch_size=8")
    is_share = is_number(smoothing, at_least=0, below=1)
    require(is_share, "label_smoothing", smoothing, "a number in [0, 1)", "label_smoothing=0.1")
    is_known = local.precision in PRECISIONS  # float16 would need a scale of the loss
    require(is_known, "precision", local.precision, f"one of {', '.join(PRECISIONS)}", "precision=bfloat16")
    if local.example_dp is not None:
        refuse_with_example_dp(local)


def refuse_with_example_dp(local: Any) -> None:
    """Refuse the settings that change loss or gradients, because DP-SGD clips the gradient of each example itself.

    Raises:
        SettingError: One of these settings differs from its default.
    """
    defaults = {"max_grad_norm": None, **LOSS_DEFAULTS}
    for name, default in defaults.items():
        value, shown = getattr(local, name), show_default(default)
        expected = f"{shown} with privacy=example, which clips the gradient of each example of the loss of the task"
        require(value == default, f"local.{name}", value, expected, f"local.{name}={shown}")
