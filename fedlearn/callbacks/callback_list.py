"""Call the callbacks of a run in order, and continue the run if a callback fails."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.formatting import format_callback_failure
from fedlearn.callbacks.read_only import read_only_round, read_only_run
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.records import Round
from fedlearn.errors import FedlearnError

CLOSE_TIMEOUT_S = 30.0
MAX_ERROR_LENGTH = 300  # characters
log = logging.getLogger(__name__)


class CallbackError(FedlearnError):
    """Report a failed callback whose error ends the run. ``__cause__`` is the exception of the callback.

    Args:
        callback: name of the callback.
        message: method that failed, and text of the error.
    """

    exit_code = 3

    def __init__(self, callback: str, message: str) -> None:
        super().__init__(message)
        self.callback = callback


@dataclass(frozen=True, kw_only=True)
class CallbackFailure:
    """Failure of a callback; the run continued without the callback.

    Attributes:
        callback: name of the callback.
        method: name of the method that failed, e.g. ``on_round``.
        round: number of the round that failed in `on_round`, or of the last round before the failure.
        error: type and text of the error, on one line of at most 300 characters.
    """

    callback: str
    method: str
    round: int
    error: str

    def __str__(self) -> str:
        return format_callback_failure(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``summary.json``."""
        return asdict(self)


class CallbackList:
    """Call several callbacks in order. `on_end` and `close` use the reverse order, as nested contexts do.

    `on_end` of callbacks with ``reads_run_files`` comes last.

    Args:
        callbacks: name -> callback.

    Attributes:
        failures: failures so far. A failed callback receives no further call except `close`.

    *Guarantees*: an error of a callback ends the run only if its ``ends_run_on_error`` is True. A callback cannot
    write to the arrays of the run. `KeyboardInterrupt` is never suppressed.
    """

    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        self.failures: list[CallbackFailure] = []
        self._callbacks = dict(callbacks)
        self._active = list(callbacks)
        self._round = 0

    def on_start(self, run: RunInfo) -> str | None:
        """Start all callbacks. Return the first reason to end the run before its next round, or None.

        Raises:
            CallbackError: a callback with ``ends_run_on_error`` failed.
        """
        self._round = run.start_round
        return self._first_reason("on_start", lambda: read_only_run(run))

    def on_round(self, round: Round) -> str | None:
        """Call all callbacks with a round. Return the first reason to end the run, or None.

        Raises:
            CallbackError: a callback with ``ends_run_on_error`` failed.
        """
        self._round = round.number
        return self._first_reason("on_round", lambda: read_only_round(round))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Call all callbacks with the summary. The summary contains the failures so far.

        Raises:
            CallbackError: a callback with ``ends_run_on_error`` failed.
        """
        order = self._active[::-1]
        order.sort(key=lambda name: self._callbacks[name].reads_run_files)
        for name in order:
            self._call(name, "on_end", deepcopy(self.add_failures(summary)))

    def close(self) -> None:
        """Close all callbacks, including failed callbacks. In the main thread, each has `CLOSE_TIMEOUT_S` seconds."""
        with ExitStack() as stack:  # closes all callbacks, even if Ctrl-C interrupts one of them
            for name in self._callbacks:
                stack.callback(self._close, name)

    def add_failures(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Return the summary. Add the key ``callback_failures`` if a callback failed."""
        failures = [failure.to_json() for failure in self.failures]
        return {**summary, **({"callback_failures": failures} if failures else {})}

    def _first_reason(self, method: str, argument: Callable[[], Any]) -> str | None:
        reasons = [self._call(name, method, argument()) for name in list(self._active)]
        return next((reason for reason in reasons if reason is not None), None)

    def _call(self, name: str, method: str, *arguments: Any) -> str | None:
        callback = self._callbacks[name]
        try:
            result = getattr(callback, method)(*arguments)
            return _require_reason(method, result) if method in ("on_start", "on_round") else None
        except (Exception, SystemExit) as error:
            failure = CallbackFailure(callback=name, method=method, round=self._round, error=_describe(error))
            if callback.ends_run_on_error and method != "close":  # at `close`, the run has already ended
                raise CallbackError(name, f"callback {failure}") from error
            self._switch_off(failure, error)
            return None

    def _close(self, name: str) -> None:
        with time_limit(CLOSE_TIMEOUT_S):
            self._call(name, "close")

    def _switch_off(self, failure: CallbackFailure, error: BaseException) -> None:
        if failure.callback in self._active:
            self._active.remove(failure.callback)
        self.failures.append(failure)
        log.error("callback %s", failure, exc_info=error)
        with suppress(OSError):  # a closed pipe must not end the run
            sys.stderr.write(f" callback {failure}\n   the run continues without it\n")


def _require_reason(method: str, result: Any) -> str | None:
    if result is None or (isinstance(result, str) and result.strip()):
        return result
    raise TypeError(f"{method} returned {result!r}; expected None, or the reason to end the run as text")


def _describe(error: BaseException) -> str:
    with suppress(Exception):  # ``__str__`` of a user's exception may raise an error, too
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return text if len(text) <= MAX_ERROR_LENGTH else f"{text[: MAX_ERROR_LENGTH - 1]}…"
    return type(error).__name__


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the body after ``seconds``, > 0. Has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still running after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
