"""Check settings against the bounds of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.errors import is_number, require
from fedlearn.runner.builders import setting_path


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


def require_within(settings: Mapping[str, Any], bounds: Mapping[str, Any], group: str) -> None:
    """Refuse settings outside their bounds.

    A missing setting is refused too, because its default may be different in another version.

    Raises:
        PolicyViolation: A setting is missing or outside its bound.
    """
    for key, bound in bounds.items():
        value = settings.get(key)
        if isinstance(bound, dict):
            is_within, accepted = value in bound["one_of"], f"one of {', '.join(map(str, bound['one_of']))}"
        else:
            low, high = bound
            is_within, accepted = is_number(value) and low <= value <= high, f"{low} to {high}"
        if not is_within:
            raise PolicyViolation(f"{setting_path(group, key)} is {value}; this node accepts {accepted}")
