"""Find a wait for nodes that cannot end, because all nodes of an in-process grid exist from the start."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from fedlearn.errors import FedlearnError

# functions of Flower that wait for nodes -> local variable with the number of nodes
FLOWER_WAITS = {"sample_nodes": "min_available_nodes", "wait_for": "num_clients"}
MAX_CALLS, MIN_SECONDS = 5, 4.0  # a loop of an app with more calls, over more seconds, and no message waits for nodes


class EndlessWait(FedlearnError):
    """Report an app that waits for more nodes than the grid has."""

    exit_code = 2

    def __init__(self, num_nodes: int, needed: int | None) -> None:
        expected = f"at least {needed} nodes" if needed else "more nodes"
        super().__init__(
            f"num_nodes is {num_nodes}, and the app waits for more nodes, which can never connect\n"
            f"  expected  {expected}\n  try       num_nodes={needed or 2 * num_nodes}"
        )


@dataclass
class WaitDetector:
    """Notice a wait that cannot end, from the calls of a grid.

    Args:
        num_nodes: number of nodes of the grid.
    """

    num_nodes: int
    _calls: list[tuple[object, float]] = field(default_factory=list)

    def note_message(self) -> None:
        """Note that the app sends or receives messages, so it does not wait for nodes."""
        self._calls.clear()

    def note_request_for_nodes(self) -> None:
        """Note that the app asks for the ids of the nodes.

        Raises:
            EndlessWait: this thread, or the main thread, waits for nodes that cannot connect.
        """
        caller = sys._getframe(2)
        for frame in (*_outer(caller), *_outer(sys._current_frames().get(threading.main_thread().ident or 0))):
            needed = _needed_nodes(frame)
            if needed is not None and needed > self.num_nodes:
                raise EndlessWait(self.num_nodes, needed)
        if _is_flower(caller):
            return
        place, now = (caller.f_code, caller.f_lineno, threading.get_ident()), time.monotonic()
        self._calls = [call for call in self._calls if call[0] == place] + [(place, now)]
        if len(self._calls) > MAX_CALLS and now - self._calls[0][1] > MIN_SECONDS:
            raise EndlessWait(self.num_nodes, None)


@contextmanager
def interruptible_main_thread() -> Iterator[Callable[[], None]]:
    """Yield a function with which another thread raises KeyboardInterrupt in the main thread.

    It works where Ctrl-C is ignored, as in a job in the background. It has no effect in the main thread. Outside the
    main thread, the yielded function does nothing.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield lambda: None
        return

    def interrupt() -> None:
        if threading.current_thread() is not main and main.ident is not None:
            signal.pthread_kill(main.ident, signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGUSR1, previous or signal.SIG_DFL)


def _outer(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_flower(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("flwr.")


def _needed_nodes(frame: FrameType) -> int | None:
    """Return the number of nodes for which a function of Flower waits; None for other functions."""
    name = FLOWER_WAITS.get(frame.f_code.co_name)
    needed = frame.f_locals.get(name) if name and _is_flower(frame) else None
    return needed if isinstance(needed, int) else None
