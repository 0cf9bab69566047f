"""Check the undocumented names that fedlearn uses from other libraries, by version and by name."""

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
        tried: tested versions, ascending.
        lowest: lowest accepted version.
        below: lowest newer version that is refused; empty for no limit.
        extra: extra of fedlearn that installs the library; empty if fedlearn always installs it.
        names: feature -> names, each as ``module:attribute.attribute`` or ``module``.
    """

    library: str
    tried: tuple[str, ...]
    lowest: str
    below: str = ""
    extra: str = ""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def verify(self, feature: str) -> None:
        """Raise an error unless the installed version is accepted and has all names of a feature.

        Raises:
            IncompatibleVersion: The version is out of range, or a name is missing.
            MissingExtra: The library is not installed.
        """
        try:
            installed = version(self.library)
        except PackageNotFoundError as error:
            raise MissingExtra(feature, self.extra) from error
        low, current, high = numbers(self.lowest), numbers(installed), numbers(self.below)
        if current < low or (high and current >= high):
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
    """Import the object with a name such as ``module:attribute.attribute``.

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
    """Return an attribute from the class dictionary, because a property of a metaclass may raise an error."""
    for owner in [*kind.__mro__, *type(kind).mro(type(kind))]:
        if name in vars(owner):
            return vars(owner)[name]
    raise AttributeError(f"{kind.__name__} has no {name}")
