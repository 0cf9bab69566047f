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

    The second signal raises `KeyboardInterrupt`. At the end of the context, the earlier handlers are restored.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True
        sys.stderr.write("\n stopping after this round (a second Ctrl-C stops at once)\n")
