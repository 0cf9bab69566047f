"""Hold the name of an option with its values, such as ``{name: cosine, warmup: 2}``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedlearn.errors import did_you_mean, require

NAME = "name"


class NamedOption(dict[str, Any]):
    """Hold the name and the values of an option. It is hashable, so records can contain it.

    >>> NamedOption(name="adam", eps=1e-6) == {"name": "adam", "eps": 1e-6}
    True
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))


def as_option(value: Any, setting: str, example: str) -> Any:
    """Return a name, a function, or a `NamedOption` with values. An option without values becomes its name.

    Args:
        value: a name, a mapping with ``name`` and values, or a function.
        setting: name of the setting, for error texts.
        example: a value that works, for error texts.

    Raises:
        SettingError: The value has another type.
    """
    if isinstance(value, Mapping):
        option = NamedOption({str(key): _as_list(item) for key, item in value.items()})
        is_named = isinstance(option.get(NAME), str)
        require(is_named, setting, dict(option), "a mapping with a name", f"'{setting}={{name:{example}}}'")
        return option if len(option) > 1 else option[NAME]
    require(isinstance(value, str) or callable(value), setting, value, "a name, or a mapping", f"{setting}={example}")
    return value


def option_name(option: str | Mapping[str, Any] | Callable[..., Any]) -> str | None:
    """Return the name of an option; None for a function.

    >>> option_name("adam"), option_name({"name": "adam", "eps": 1e-6}), option_name(print)
    ('adam', 'adam', None)
    """
    if isinstance(option, Mapping):
        return str(option[NAME])
    return option if isinstance(option, str) else None


def option_values(option: Any) -> dict[str, Any]:
    """Return the values of an option, without its name."""
    return {key: value for key, value in option.items() if key != NAME} if isinstance(option, Mapping) else {}


def describe_option(option: Any) -> str:
    """Return the name and the values of an option as the command line writes them.

    >>> describe_option({"name": "cosine", "warmup": 2})
    'cosine(warmup=2)'
    """
    name = option_name(option) or getattr(option, "__name__", None) or getattr(option, "func", option).__name__
    values = ", ".join(f"{key}={value}" for key, value in option_values(option).items())
    return f"{name}({values})" if values else str(name)


def refuse_unknown_values(option: Any, known: Mapping[str, Any], setting: str) -> None:
    """Refuse values of an option that the option does not have.

    Raises:
        SettingError: A value has an unknown name.
    """
    name = option_name(option)
    for key, value in option_values(option).items():
        near = did_you_mean(key, known)
        expected = f"one of {', '.join(known)}" if known else f"no value: {name} has none"
        default = known.get(near or "")
        shown = value if default is None or isinstance(value, type(default)) else default
        fix = f"'{setting}={{name:{name},{near}:{shown}}}'" if near else f"{setting}={name}"
        require(key in known, f"{setting}.{key}", value, expected, fix)


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, list | tuple) else value
