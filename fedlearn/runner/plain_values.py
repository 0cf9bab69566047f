"""Check values from an untrusted message: plain values of limited size, of the type that a parameter states."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from fedlearn.core.plain_text import plain_line
from fedlearn.errors import SettingError

MAX_DEPTH = 8  # nested lists and mappings
MAX_VALUES = 20_000  # values of all settings together
MAX_TEXT = 1_000  # characters of a text or of a key
MAX_INTEGER = 2**63 - 1
INTERPOLATION, SPECIAL_KEY = "${", re.compile(r"_\w+_")  # both have a meaning in Hydra
SCALARS = (bool, int, float, str, NoneType)


def require_plain(value: Any, setting: str) -> None:
    """Refuse everything but booleans, numbers, texts, null, lists and mappings of these, of limited size.

    Args:
        value: value from an untrusted message.
        setting: name of the value, for error texts; empty for all settings.

    Raises:
        SettingError: A value has another type, is not finite, too long, too deep or an interpolation, or a key has a
            meaning in Hydra. The error quotes at most 60 characters.
    """
    for count, (path, depth, node) in enumerate(_walk(value, setting)):
        problem = _problem(node) if depth <= MAX_DEPTH else f"at most {MAX_DEPTH} nested lists and mappings"
        if count >= MAX_VALUES:
            problem = f"at most {MAX_VALUES} values"
        if problem:
            raise refusal(path, node.value if isinstance(node, _Key) else node, problem)


def require_type(value: Any, hint: Any, setting: str) -> None:
    """Refuse a plain value that does not have the type of a parameter.

    Args:
        value: value that `require_plain` has accepted.
        hint: type of the parameter. Parameters of other types than plain values accept nothing but null, if they
            accept null.
        setting: name of the value, for error texts.

    Raises:
        SettingError: The value has another type.
    """
    if not _has_type(value, hint):
        raise refusal(setting, value, describe_type(hint))


def describe_type(hint: Any) -> str:
    """Return the accepted values of a parameter as a text.

    >>> describe_type(int | None), describe_type(Sequence[str])
    ('a whole number or null', 'a list (a text each)')
    """
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (Union, UnionType):
        texts = [describe_type(arg) for arg in args if describe_type(arg) != "no value"]
        return " or ".join(texts) or "no value"
    if _is_list(origin or hint):
        items = [arg for arg in args if arg not in (Ellipsis, Any)]
        return f"a list ({describe_type(items[0])} each)" if items else "a list"
    if _is_mapping(origin or hint):
        return "a mapping"
    return "a plain value" if hint is Any else names.get(hint, "no value")


def refusal(setting: str, value: Any, expected: str) -> SettingError:
    """Return the error for a refused value, which quotes the start of the value only."""
    name = plain_line(setting)
    return SettingError(name, shortened(value), expected, f"change {name[:60]}")


def shortened(value: Any) -> str:
    """Return the start of a value as one line of printable characters.

    >>> shortened("a" * 100)[-5:], shortened(10**90), shortened([1, "x"])
    ('aa...', 'a large number', 'a list')
    """
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    is_long_number = type(value) is int and abs(value) > 10**60
    text = "a large number" if is_long_number else str(value) if isinstance(value, SCALARS) else type(value).__name__
    text = plain_line(text[:61])
    return text if len(text) <= 60 or isinstance(value, bool) else f"{text[:57]}..."


def _walk(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, int, Any]]:
    """Yield path, depth and value of each node of a tree; a key is a value of its own. The walk is not recursive."""
    pending = [(path, depth, value)]
    while pending:
        path, depth, node = pending.pop()
        yield path, depth, node
        if depth > MAX_DEPTH:
            continue
        if type(node) is dict:
            for key, child in node.items():
                child_path = f"{path}.{shortened(key)}" if path else shortened(key)
                yield child_path, depth, _Key(key, child)
                pending.append((child_path, depth + 1, child))
        elif type(node) is list:
            pending += [(f"{path}.{number}", depth + 1, child) for number, child in enumerate(node)]


class _Key(NamedTuple):
    """A key of a mapping, in contrast to a value."""

    key: Any
    value: Any


def _problem(node: Any) -> str | None:
    """Return the expected value if the node is not plain, else None."""
    text = node.key if isinstance(node, _Key) else node
    if isinstance(node, _Key) and type(text) is not str:
        return "texts as keys"
    if isinstance(node, _Key) and SPECIAL_KEY.fullmatch(text):
        return "no key with a meaning in Hydra: settings have the name of an option and plain values"
    if type(text) is str:
        if len(text) > MAX_TEXT:
            return f"at most {MAX_TEXT} characters"
        return "a value without an interpolation (${...})" if INTERPOLATION in text else None
    if type(node) in (list, dict) and len(node) > MAX_VALUES:
        return f"at most {MAX_VALUES} values"
    if type(node) is int:
        return None if abs(node) <= MAX_INTEGER else "a whole number below 2^63"
    if type(node) is float:
        return None if isfinite(node) else "a finite number"
    return None if type(node) in (bool, NoneType, list, dict) else "a plain value"


def _has_type(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return type(value) is str and value in args
    if origin in (Union, UnionType):
        return any(_has_type(value, arg) for arg in args)
    if _is_list(origin or hint):
        items = [arg for arg in args if arg is not Ellipsis] or [Any]
        return type(value) is list and all(_has_type(item, items[0]) for item in value)
    if _is_mapping(origin or hint):
        content = args[1] if len(args) == 2 else Any
        return type(value) is dict and all(_has_type(item, content) for item in value.values())
    if hint is float:
        return type(value) in (int, float)
    return hint in SCALARS and type(value) is hint


def _is_list(kind: Any) -> bool:
    return kind in (list, tuple, Sequence)


def _is_mapping(kind: Any) -> bool:
    return kind in (dict, Mapping)
