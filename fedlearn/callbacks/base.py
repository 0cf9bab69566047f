"""Base class of callbacks. The runner calls callbacks before, during and after a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.records import Round


class Callback:
    """Observe a run without changing it. A subclass implements the methods that it needs.

    The order of calls is `on_start`, then `on_round` after each round, then `on_end`, then `close`. The runner always
    calls `close`. It does not call `on_end` if an error ends the run before its summary is written.

    The constructor only stores settings, because it also runs when settings are checked. Open files and connections
    in `on_start`. All arrays of a round are read-only, and all its dicts are copies.

    Attributes:
        ends_run_on_error: True if an error of this callback ends the run. False, the default, continues the run
            without the callback. Errors of `close` never end the run.
        reads_run_files: True calls `on_end` after the report and all other files of the run are written.
        operator_variables: environment variables that the operator of a coordinator must set before a submission may
            name this callback, e.g. the address of a server. Default none.
    """

    ends_run_on_error: bool = False
    reads_run_files: bool = False
    operator_variables: tuple[str, ...] = ()

    def on_start(self, run: RunInfo) -> str | None:
        """Handle the start of the run, before the first round.

        Args:
            run: description of the run. In a resumed run, ``run.history`` has the completed rounds. Apply the rule of
                `on_round` to them, so that a resumed run ends after the same round as an uninterrupted run.

        Returns:
            None, or the reason to end the run before the next round.
        """
        return None

    def on_round(self, round: Round) -> str | None:
        """Handle one round. ``round.evaluation`` is None in a round without evaluation.

        The runner writes the checkpoint of the round afterwards. After a crash, a resumed run may repeat the round.

        Returns:
            None, or the reason to end the run after this round.
        """
        return None

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Handle the end of the run. ``summary`` is the content of ``summary.json``."""

    def close(self) -> None:
        """Release files and connections. A second call has no effect."""
