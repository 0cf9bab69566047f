"""Call the callbacks of a run in order, and keep the run safe from a callback that fails."""

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
    """A callback failed whose error ends the run; the cause is its exception.

    Args:
        callback: name of the callback.
        message: the stage and the error.
    """

    exit_code = 3

    exit_code = 3

    def __init__(self, callback: str, message: str) -> None:
        super().__init__(message)
        self.callback = callback


@dataclass(frozen=True, kw_only=True)
class CallbackFailure:
    """A callback that failed, without which the run went on.

    Attributes:
        callback: name of the callback.
        method: method that failed.
        round: last round before the failure, or the round itself.
        error: type and text of the error, on one line.
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
    """Calls callbacks in order; the end and the closing have the reverse order, as with nested contexts.

    Args:
        callbacks: name -> callback.

    Attributes:
        failures: callbacks that failed and are switched off.

    *Guarantees*: an error of a callback ends the run only if its ``ends_run_on_error`` is True. A callback cannot
    write to the arrays of the run. `KeyboardInterrupt` passes through.
    """

    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        self.failures: list[CallbackFailure] = []
        self._callbacks = dict(callbacks)
        self._active = list(callbacks)
        self._round = 0

    def on_start(self, run: RunInfo) -> str | None:
        """Start all callbacks. Return the first reason to end the run before its next round, or None.

        Raises:
            CallbackError: a callback failed whose error ends the run.
        """
        self._round = run.start_round
        return self._first_reason("on_start", lambda: read_only_run(run))

    def on_round(self, round: Round) -> str | None:
        """Call all callbacks with a round. Return the first reason to end the run, or None.

        Raises:
            CallbackError: a callback failed whose error ends the run.
        """
        self._round = round.number
        return self._first_reason("on_round", lambda: read_only_round(round))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Call all callbacks with the summary, which has the failures until then.

        Raises:
            CallbackError: a callback failed whose error ends the run.
        """
        for name in self._active[::-1]:
            self._call(name, "on_end", deepcopy(self.add_failures(summary)))

    def close(self) -> None:
        """Close all callbacks, including failed callbacks. Give each `CLOSE_TIMEOUT_S` in the main thread."""
        with ExitStack() as stack:  # closes all of them, even if Ctrl-C interrupts one
            for name in self._callbacks:
                stack.callback(self._close, name)

    def add_failures(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Return the summary with the key ``callback_failures`` if there are any."""
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
            if callback.ends_run_on_error and method != "close":  # then the run has ended
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
        with suppress(OSError):  # a closed pipe does not end a run
            sys.stderr.write(f" callback {failure}\n   the run continues without it\n")


def _require_reason(method: str, result: Any) -> str | None:
    if result is None or (isinstance(result, str) and result.strip()):
        return result
    raise TypeError(f"{method} returned {result!r}; expected None, or the reason to end the run as text")


def _describe(error: BaseException) -> str:
    with suppress(Exception):  # an error of a user may fail to describe itself
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return text if len(text) <= MAX_ERROR_LENGTH else f"{text[: MAX_ERROR_LENGTH - 1]}…"
    return type(error).__name__


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the body after ``seconds``; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
