"""Checks of the undocumented names that fedlearn uses from other libraries, by version and by name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fedlearn.errors import IncompatibleVersion, MissingExtra


@dataclass(frozen=True, eq=False)
class PrivateNames:
    """The undocumented names of one library that its compatibility module uses.

    Args:
        library: name of the distribution on PyPI.
        tried: versions that the names were tried with, the newest last.
        lowest: first version that is accepted.
        below: first version that is refused again; empty: none.
        extra: extra of fedlearn that installs the library; empty: fedlearn always does.
        names: feature -> names, each as ``module:attribute.attribute`` or ``module``.
    """

    library: str
    tried: tuple[str, ...]
    lowest: str
    below: str = ""
    extra: str = ""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def verify(self, feature: str) -> None:
        """Raise unless the installed version is accepted and has all names of a feature.

        Raises:
            IncompatibleVersion: the version is out of range, or a name is missing.
            MissingExtra: the library is not installed.
        """
        try:
            installed = version(self.library)
        except PackageNotFoundError as error:
            raise MissingExtra(feature, self.extra) from error
        low, here, high = numbers(self.lowest), numbers(installed), numbers(self.below)
        if here < low or (high and here >= high):
            raise self.incompatible()
        for name in self.names[feature]:
            try:
                resolve(name)
            except (ImportError, AttributeError) as error:
                raise self.incompatible(name) from error

    def incompatible(self, name: str = "") -> IncompatibleVersion:
        """Return the error for the installed version, or for a name that it lacks."""
        accepted = f">={self.lowest}" + (f",<{self.below}" if self.below else "")
        return IncompatibleVersion(self.library, version(self.library), accepted, self.tried, name.replace(":", "."))


def resolve(name: str) -> Any:
    """Return the object that has a name such as ``module:attribute.attribute``.

    >>> resolve("os.path:join").__name__
    'join'
    """
    module, _, path = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in filter(None, path.split(".")):
        value = getattr(value, part) if not isinstance(value, type) else _of_class(value, part)
    return value


def numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version.

    >>> numbers("1.41.0rc1")
    (1, 41, 0)
    """
    leading = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def _of_class(kind: type, name: str) -> Any:
    """Return an attribute as it stands in the class: a property of a metaclass may refuse to be read."""
    for owner in [*kind.__mro__, *type(kind).mro(type(kind))]:
        if name in vars(owner):
            return vars(owner)[name]
    raise AttributeError(f"{kind.__name__} has no {name}")
