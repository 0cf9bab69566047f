"""The protocol of callbacks: what the runner calls before, during and after a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.records import Round


class Callback(Protocol):
    """Observes a run and does not change it.

    `on_run_start` is called once, `on_round_end` after each round, and `on_run_end` once at the end. `close` is always
    called, also after an error.
    """

    def on_run_start(self, run: RunInfo) -> None:
        """Handle the start of the run, before the first round."""
        ...

    def on_round_end(self, round: Round) -> None:
        """Handle one round, before its checkpoint is written, so that no checkpoint is ahead of the files."""
        ...

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Handle the end of the run, with the result of `fedlearn.callbacks.summary.summarise`."""
        ...

    def close(self) -> None:
        """Release files and the terminal; a second call has no effect."""
        ...
