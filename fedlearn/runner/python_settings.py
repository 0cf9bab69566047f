"""Turn values of a Python program into overrides of settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from os import PathLike, fspath
from typing import Any

import numpy as np

from fedlearn.core.records import LocalSettings
from fedlearn.errors import SettingError
from fedlearn.runner.compat import quote, quote_key


def override_texts(settings: Mapping[str, Any]) -> list[str]:
    """Return overrides ``setting=value`` for settings of a Python program.

    Args:
        settings: dotted name -> value. A value is None, a boolean, a number, a text, a path, a sequence or
            a mapping. A mapping sets the single settings of its group. `fedlearn.LocalSettings` is such a mapping.

    Raises:
        SettingError: a value has another type.

    >>> override_texts({"rounds": 5, "local": {"epochs": 2}, "strategy": "fedprox", "scenario.ignore": ["a b"]})
    ['rounds=5', 'local.epochs=2', "strategy='fedprox'", "scenario.ignore=['a b']"]
    """
    return [f"{name}={_text(name, value)}" for name, value in _flat(settings)]


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, LocalSettings):
            value = {field.name: getattr(value, field.name) for field in fields(value)}
            value = {key: item for key, item in value.items() if item is not None}
        if isinstance(value, Mapping) and "." not in name:
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        else:
            yield name, value


def _text(name: str, value: Any) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | PathLike):
        return quote(str(fspath(value)))
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{quote_key(str(key))}:{_text(name, item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(_text(name, item) for item in value) + "]"
    expected = "a number, a text, a list, a mapping or None"
    raise SettingError(name, type(value).__name__, expected, f"the option of {name} by its name, or settings={{...}}")
