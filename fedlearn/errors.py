"""Define the errors for users. A message has the value, the expected value and one thing to try."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, ClassVar

from fedlearn.advice import as_python, label, with_group

__all__ = [
    "CheckpointError",
    "DataError",
    "FedlearnError",
    "IncompatibleVersion",
    "MissingExtra",
    "SettingError",
    "TooManyFailures",
    "did_you_mean",
    "is_count",
    "is_number",
    "require",
]


class FedlearnError(Exception):
    """Serve as the base class of all errors that fedlearn raises on purpose.

    Attributes:
        exit_code: exit code of a command that ends with this error.
    """

    exit_code: ClassVar[int] = 2

    def on_command_line(self) -> str:
        """Return the text for a user of a command. The text for users of Python may have Python code."""
        return str(self)


class SettingError(FedlearnError, ValueError):
    """Report a setting that is out of range.

    Args:
        setting: name as the user types it, e.g. ``strategy.mu``.
        value: value that the setting has.
        expected: description of the accepted values.
        fix: one thing to try, as words for the command line; `fedlearn.advice` writes values in quotes.

    A setting without a group is an argument of Python, and the text has its advice as Python code.

    >>> print(SettingError("strategy.mu", -1, "a number >= 0", "strategy.mu=0.1"))
    strategy.mu is -1
      expected  a number >= 0
      try       strategy.mu=0.1
    >>> print(SettingError("steps", 0, "a whole number >= 1, or null", "steps=null"))
    steps is 0
      expected  a whole number >= 1, or null
      try       steps=None
    """

    def __init__(self, setting: str, value: object, expected: str, fix: str) -> None:
        super().__init__(setting, value, expected, fix)
        self.setting, self.value, self.expected, self.fix = setting, value, expected, fix

    def __str__(self) -> str:
        return self._text(as_python(self.fix) if self.setting.isidentifier() else self.fix)

    def on_command_line(self) -> str:
        """Return the text with its advice as words for the command line."""
        return self._text(self.fix)

    def _text(self, fix: str) -> str:
        return f"{self.setting} is {self.value}\n  expected  {self.expected}\n{label(fix)}"

    def with_prefix(self, group: str, names: Iterable[str] = ()) -> SettingError:
        """Return this error with the name of a group before the name of the setting.

        Args:
            group: group of the setting on the command line, e.g. ``strategy``.
            names: names of all settings of the group; the advice may have several of them.
        """
        ours = {self.setting.partition(".")[0], *names}
        fix = with_group(self.fix, group, ours.__contains__)
        return SettingError(f"{group}.{self.setting}", self.value, self.expected, fix)


class DataError(FedlearnError):
    """Report data that are missing or do not fit the scenario."""


class CheckpointError(FedlearnError):
    """Report a checkpoint that is missing, damaged, or of another model."""


class TooManyFailures(FedlearnError):
    """Report a round in which all clients failed, or more clients than ``max_failures`` allows.

    Args:
        message: number of failed clients, and the reason of the first failure.
        failures: one `fedlearn.Failure` per failed client.

    Attributes:
        is_before_sending: True if no client had sent an update yet.
        ledger: privacy ledger with the cost of the failed round, if its uploads may have left real clients; else None.
            To run the round again, continue with ``replace(state, ledger=error.ledger)``.
    """

    def __init__(self, message: str, failures: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.failures = failures
        self.is_before_sending = False
        self.ledger: Any = None


class MissingExtra(FedlearnError, ImportError):
    """Report an optional dependency that is not installed.

    Args:
        needed_for: feature that needs the dependency, e.g. ``engine=ray``.
        extra: extra of this package that installs the dependency.
    """

    def __init__(self, needed_for: str, extra: str) -> None:
        super().__init__(f"{needed_for} needs an optional dependency\n  try       pip install 'fedlearn[{extra}]'")


class IncompatibleVersion(FedlearnError):
    """Report an installed library whose version does not work with fedlearn.

    Args:
        library: name of the distribution on PyPI.
        installed: installed version.
        accepted: accepted range of versions, as pip writes it.
        tried: tested versions, the newest last.
        missing: name that the installed version lacks; empty if the version itself is out of range.
    """

    def __init__(self, library: str, installed: str, accepted: str, tried: tuple[str, ...], missing: str = "") -> None:
        cause = f"  because   it has no {missing}\n" if missing else ""
        super().__init__(
            f"{library} {installed} does not work with this version of fedlearn\n{cause}"
            f"  expected  {library}{accepted}; tried with {', '.join(tried)}\n"
            f'  try       pip install "{library}=={tried[-1]}"'
        )


def require(condition: bool, setting: str, value: object, expected: str, fix: str) -> None:
    """Raise a `SettingError` unless the condition is true.

    Args:
        condition: True if the setting is accepted.
        setting: see `SettingError`.
        value: see `SettingError`.
        expected: see `SettingError`.
        fix: see `SettingError`.
    """
    if not condition:
        raise SettingError(setting, value, expected, fix)


def is_number(value: object, *, at_least: float = float("-inf"), below: float = float("inf")) -> bool:
    """Return True for an int or float (not bool, not NaN) in [at_least, below)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and at_least <= value < below


def is_count(value: object, *, at_least: int = 1) -> bool:
    """Return True for an int (not bool) of at least ``at_least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Return the known word closest to ``word``.

    Args:
        word: word as typed.
        known: words to compare with.
        cutoff: smallest accepted similarity, in [0, 1]; None is returned if no word reaches it.

    >>> did_you_mean("fedadm", ["fedavg", "fedadam"])
    'fedadam'
    """
    close = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return close[0] if close else None
