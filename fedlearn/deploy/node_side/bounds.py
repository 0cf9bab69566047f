"""Check settings against the bounds of a policy, and against default bounds for settings without a bound.

Bounds of a policy have one of two forms: ``[low, high]`` is a range, ``{one_of: [...]}`` is a choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlearn.core.named_option import option_name
from fedlearn.core.optimizers import PORTABLE_OPTIMIZERS
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.errors import is_number, require
from fedlearn.runner.builders import setting_path
from fedlearn.runner.plain_values import MAX_INTEGER, shortened

# Each whole number of an installed option has a default bound, because it may cost memory or time.
DEFAULT_BOUNDS: Mapping[str, tuple[int, int]] = {
    "bands": (1, 1_000),
    "bits": (1, 64),
    "bucket": (1, 2**20),
    "buffer_size": (1, 10_000),
    "classes_per_client": (1, 10_000),
    "clients_per_round": (1, 1_000_000),
    "cohort": (1, 1_000_000),
    "concurrency": (1, 10_000),
    "factors": (1, 1_024),
    "head_epochs": (1, 100),
    "heads": (1, 1_024),
    "image_channels": (1, 4),
    "image_size": (1, 1_024),
    "layers": (0, 100),
    "length": (1, 4_096),
    "levels": (1, 2**16),
    "min_available_nodes": (0, 1_000_000),
    "min_characters": (0, 1_000_000_000),
    "min_evaluate_nodes": (0, 1_000_000),
    "min_train_nodes": (0, 1_000_000),
    "modulus_bits": (1, 64),
    "num_candidates": (1, 1_000_000),
    "num_clients": (1, 10_000),
    "num_clusters": (1, 100),
    "num_generated": (1, 10_000),
    "num_iterations": (1, 1_000),
    "num_malicious": (0, 1_000_000),
    "num_malicious_nodes": (0, 1_000_000),
    "num_models": (2, 100),
    "num_negatives": (0, 1_000),
    "num_nodes_to_select": (0, 1_000_000),
    "num_root_examples": (1, 1_000_000),
    "num_to_keep": (1, 1_000_000),
    "num_tokens": (1, 2**20),
    "rank": (1, 1_024),
    "root_client": (0, 2**31),
    "seed": (0, MAX_INTEGER),
    "separation": (1, 1_000_000),
    "shift": (0, 1_024),
    "size": (1, 10_000),
    "start_epochs": (1, 100),
    "test_windows": (1, 1_000_000),
    "text_length": (1, 4_096),
    "threshold": (1, 1_000_000),
    "width": (1, 8_192),
}
OTHER_NUMBERS = (-1_000_000_000, 1_000_000_000)  # real numbers, and settings of builders that an operator has added
LOCAL_BOUNDS: Mapping[str, tuple[int, int]] = {
    "epochs": (1, 100),
    "steps": (1, 10_000),
    "batch_size": (1, 65_536),
    "learning_rate": (0, 1_000),
    "momentum": (0, 1),
    "weight_decay": (0, 1_000),
    "max_grad_norm": (0, 1_000_000),
    "micro_batch_size": (1, 65_536),
}
MAX_CLASS_WEIGHT = 1_000  # it multiplies the loss, as the learning rate does
MAX_EXAMPLES_PER_REQUEST = 10_000_000  # steps x batch size of one client, if a request sets the number of steps


def check_bounds(bounds: Mapping[str, Any], group: str) -> None:
    """Refuse bounds that are neither a range nor a choice.

    Raises:
        SettingError: A bound has another form.
    """
    for key, bound in bounds.items():
        is_range = isinstance(bound, list) and len(bound) == 2 and all(is_number(end) for end in bound)
        is_choice = isinstance(bound, dict) and list(bound) == ["one_of"] and isinstance(bound["one_of"], list)
        expected = "[low, high] or {one_of: [...]}"
        require(is_range or is_choice, f"{group}.{key}", bound, expected, f"{key}: [1, 10]")


def require_within(values: Mapping[str, Any], bounds: Mapping[str, Any], group: str) -> None:
    """Refuse values outside the bounds of a policy. A missing value is refused too.

    Raises:
        PolicyViolation: A value is missing or outside its bound.
    """
    for key, bound in bounds.items():
        value = values.get(key)
        if isinstance(bound, Mapping):
            is_flag = isinstance(value, bool)  # True is equal to 1
            is_within = any(value == known and isinstance(known, bool) == is_flag for known in bound["one_of"])
            accepted = f"one of {', '.join(map(str, bound['one_of']))}"
        else:
            low, high = bound
            is_within, accepted = is_number(value) and low <= value <= high, f"{low} to {high}"
        if not is_within:
            raise PolicyViolation(f"{setting_path(group, key)} is {shortened(value)}; this node accepts {accepted}")


def require_default_bounds(values: Mapping[str, Any], bounded: Mapping[str, Any], group: str) -> None:
    """Refuse numbers outside the default bounds, for the settings without a bound in the policy.

    Args:
        values: value of each setting that the request names.
        bounded: bounds of the policy; these settings are not checked here.
        group: group of the settings in error texts.

    Raises:
        PolicyViolation: A number is outside its default bound.
    """
    for key, value in values.items():
        if type(value) in (int, float) and key not in bounded:
            low, high = DEFAULT_BOUNDS.get(key, OTHER_NUMBERS)
            require_within({key: value}, {key: (low, high)}, group)


def require_local_within(local: Mapping[str, Any], bounds: Mapping[str, Any]) -> None:
    """Refuse settings of local training outside the bounds of the policy, or outside the default bounds.

    Without a bound for ``optimizer``, only optimizers that are equal in all frameworks are accepted.

    Args:
        local: settings of local training.
        bounds: bounds of the policy. They apply to the names of optimizer and schedule.

    Raises:
        PolicyViolation: A setting is outside its bound, or a client would process too many examples.
    """
    named = {key: option_name(local[key]) for key in ("optimizer", "schedule") if key in local}
    require_within({**local, **named}, bounds, "local")
    unbounded = {key: bound for key, bound in LOCAL_BOUNDS.items() if key not in bounds and local.get(key) is not None}
    require_within(local, unbounded, "local")
    if "optimizer" in named and "optimizer" not in bounds:
        require_within(named, {"optimizer": {"one_of": list(PORTABLE_OPTIMIZERS)}}, "local")
    weights = local.get("class_weights")
    for weight in weights if isinstance(weights, list | tuple) and "class_weights" not in bounds else ():
        require_within({"class_weights": weight}, {"class_weights": (0, MAX_CLASS_WEIGHT)}, "local")
    num_examples = (local["steps"] or 0) * local["batch_size"]
    if num_examples > MAX_EXAMPLES_PER_REQUEST and not {"steps", "batch_size"} <= bounds.keys():
        raise PolicyViolation(
            f"local.steps x local.batch_size is {num_examples}; this node accepts at most {MAX_EXAMPLES_PER_REQUEST}"
        )
