"""Sign persons in with a token, and remember them by a cookie."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

SESSION_S = 12 * 3600.0  # seconds after which a person signs in again
MAX_SESSIONS = 500  # sessions that are kept, the newest first
WINDOW_S = 60.0  # seconds in which failed attempts are counted
MAX_FAILED = 5  # failed attempts of one address within the window
MAX_FAILED_TOTAL = 300  # failed attempts of all addresses within the window; a token has 256 random bits


class Accounts(Protocol):
    """Know the persons who may read the page."""

    def check(self, token: str) -> str | None:
        """Return the name of the person with this token; None for a wrong token. The duration says nothing about it."""

    def record(self, person: str | None, address: str) -> None:
        """Write an attempt to sign in to a log.

        Args:
            person: name of the person; None for a wrong token.
            address: address of the sender.
        """

    def is_active(self, person: str) -> bool:
        """Return whether a person who signed in earlier may still read the page."""

    def may_open_report(self, person: str, key: str) -> bool:
        """Return whether a person may open the report of a run, which has all settings.

        Args:
            person: name of the person.
            key: key of the run.
        """


@dataclass
class Attempts:
    """Limit the failed attempts to sign in.

    Args:
        clock: returns the time in seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _failed: dict[str, deque[float]] = field(default_factory=dict)
    _all: deque[float] = field(default_factory=deque)

    def is_limited(self, address: str) -> bool:
        """Return whether an address, or all of them together, failed too often."""
        now = self.clock()
        for times in (self._all, *self._failed.values()):
            while times and times[0] < now - WINDOW_S:
                times.popleft()
        self._failed = {each: times for each, times in self._failed.items() if times}
        return len(self._failed.get(address, ())) >= MAX_FAILED or len(self._all) >= MAX_FAILED_TOTAL

    def count(self, address: str) -> None:
        """Count an attempt before it is checked, so that attempts at the same time all count."""
        now = self.clock()
        self._failed.setdefault(address, deque()).append(now)
        self._all.append(now)

    def forget(self, address: str) -> None:
        """Forget the attempts of an address that has signed in."""
        for at in self._failed.pop(address, ()):
            with suppress(ValueError):  # its window has ended
                self._all.remove(at)


@dataclass
class Sessions:
    """Remember the persons who signed in. The server keeps digests of the secrets only.

    Args:
        accounts: persons.
        clock: returns the time in seconds.
    """

    accounts: Accounts
    clock: Callable[[], float] = time.monotonic
    _open: dict[str, tuple[str, float]] = field(default_factory=dict)  # digest -> person, end of the session

    def start(self, person: str) -> str:
        """Return the secret of a new session."""
        secret = secrets.token_urlsafe(32)
        self._open[_digest(secret)] = (person, self.clock() + SESSION_S)
        while len(self._open) > MAX_SESSIONS:
            del self._open[next(iter(self._open))]
        return secret

    def person(self, secret: str) -> str | None:
        """Return the person of a session; None if it ended, or if the person may no longer read the page."""
        person, end = self._open.get(_digest(secret), ("", 0.0))
        if not person or self.clock() > end or not self.accounts.is_active(person):
            self.end(secret)
            return None
        return person

    def end(self, secret: str) -> None:
        """End the session with this secret."""
        self._open.pop(_digest(secret), None)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
