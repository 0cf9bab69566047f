"""Handle Ctrl-C and SIGTERM: the first signal stops the run after its round, the second signal stops it at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Context manager that sets ``is_requested`` at the first SIGINT or SIGTERM, and stops at once at the second.

    The second signal raises `KeyboardInterrupt`. At the end of the context, the earlier handlers are restored. A
    context around this context, also of the caller, then has the same ``is_requested``. So a signal during the last
    steps of a run still ends a series of runs.

    Args:
        at_once: whether the first signal raises `KeyboardInterrupt`, too. A callback of the garbage collector can drop
            this exception; ``is_requested`` remains.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.is_requested, self._at_once = False, at_once
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, Interrupt):
                outer.is_requested |= self.is_requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.is_requested = self.is_requested, True
        if again or self._at_once:
            raise KeyboardInterrupt
        sys.stderr.write("\n stopping after this round (a second Ctrl-C stops at once)\n")
