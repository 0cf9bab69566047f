"""Import public names of a package on first use, so that the import of the package loads no framework."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from fedlearn.errors import MissingExtra, did_you_mean


class LazyName(NamedTuple):
    """The module that defines a public name, and the extra that the module needs.

    Attributes:
        module: dotted name of the module.
        extra: extra of fedlearn to install; empty if the module needs none.
    """

    module: str
    extra: str = ""


def lazy_names(
    package: str, names: Mapping[str, LazyName], *, namespaces: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package with names that are imported on first use.

    Args:
        package: ``__name__`` of the package; its ``__all__`` lists the public names.
        names: lazy names, each with its module and extra.
        namespaces: subpackages that are attributes without an import statement.

    *Guarantees*: an unknown name raises `AttributeError` with the closest name or with its namespace. A lazy name
    whose dependency is not installed raises `MissingExtra`.
    """

    def get(name: str) -> Any:
        if name in namespaces:
            return import_module(f"{package}.{name}")
        if name not in names:
            raise AttributeError(_unknown(package, name, namespaces))
        module, extra = names[name]
        try:
            value = getattr(import_module(module), name)
        except ModuleNotFoundError as missing:
            if not extra or (missing.name or "").startswith("fedlearn"):
                raise
            raise MissingExtra(f"{package}.{name}", extra) from missing
        setattr(sys.modules[package], name, value)
        return value

    def public_names() -> list[str]:
        special = [name for name in vars(sys.modules[package]) if name.startswith("__")]
        return sorted({*sys.modules[package].__all__, *namespaces, *special})

    return get, public_names


def _unknown(package: str, name: str, namespaces: Sequence[str]) -> str:
    message = f"module {package!r} has no attribute {name!r}"
    if name.startswith("__"):
        return message
    homes = [f"{module}.{name}" for module, public in _public(package, namespaces) if name in public]
    if homes:
        return f"{message}\n  try       {homes[0]}"
    close = did_you_mean(name, [*sys.modules[package].__all__, *namespaces])
    return f"{message}; did you mean {close!r}?" if close else message


def _public(package: str, namespaces: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    for namespace in namespaces:
        module = f"{package}.{namespace}"
        yield module, getattr(import_module(module), "__all__", ())
