"""A console whose reader may go away (``| head``) without ending the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fedlearn.records import Round
from fedlearn.sinks.base import RunInfo
from fedlearn.sinks.console import Console


class Unbreakable:
    """Passes everything on to a console until its reader goes away."""

    def __init__(self, console: Console) -> None:
        self._console: Console | None = console

    def start(self, run: RunInfo) -> None:
        """See `Console.start`."""
        self._try(lambda console: console.start(run))

    def round(self, round: Round) -> None:
        """See `Console.round`."""
        self._try(lambda console: console.round(round))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See `Console.finish`."""
        self._try(lambda console: console.finish(summary))

    def close(self) -> None:
        """See `Console.close`."""
        self._try(lambda console: console.close())

    def say(self, line: str) -> None:
        """One more line, as it is."""
        self._try(lambda console: sys.stdout.write(f"{line}\n"))

    def _try(self, tell: Callable[[Console], object]) -> None:
        if self._console is None:
            return
        try:
            tell(self._console)
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit):  # rich makes the one into the other
            self._console = None
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit does not stumble over it
