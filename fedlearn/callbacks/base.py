"""What onlookers are told: the run before it starts, each round, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.records import Round


class Callback(Protocol):
    """Looks on and changes nothing: ``on_run_start`` once, ``on_round_end`` after each, ``on_run_end`` at the end, ``close`` always."""

    def on_run_start(self, run: RunInfo) -> None:
        """Before the first round."""
        ...

    def on_round_end(self, round: Round) -> None:
        """After each round, before its checkpoint is written, so that no checkpoint is ahead of the files."""
        ...

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """At the end, with what `fedlearn.callbacks.summary.summarise` gives."""
        ...

    def close(self) -> None:
        """Let go of files and the terminal; also after an error, and harmless when called twice."""
        ...
