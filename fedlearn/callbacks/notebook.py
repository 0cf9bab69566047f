"""Show a run in a notebook, as a table that changes after each round."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from html import escape
from typing import Any

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.formatting import failure_notice, format_epsilon, format_metric, header_lines, summary_lines
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.records import Round

MAX_ROWS = 12  # rounds in the table


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class NotebookTable(Callback):
    """Show the header of a run, and a table of its last evaluated rounds."""

    def __init__(self) -> None:
        self._run: RunInfo | None = None
        self._rows: list[dict[str, str]] = []
        self._notices: list[str] = []
        self._handle: Any = None

    def on_start(self, run: RunInfo) -> None:
        """Show the header of the run."""
        from IPython.display import HTML, display

        self._run, self._rows, self._notices = run, [], []
        self._handle = display(HTML(self._html("started")), display_id=True)

    def on_round(self, round: Round) -> None:
        """Add an evaluated round to the table. Show the number of any other round."""
        assert self._run is not None
        if round.failures:
            self._notices.append(failure_notice(round, self._run))
        if round.evaluation is not None:
            values = {name: format_metric(name, value) for name, value in round.evaluation.pooled.items()}
            epsilon = {"ε": format_epsilon(round.privacy.value)} if round.privacy else {}
            self._rows.append({"round": f"{round.number:,}", **values, **epsilon})
        self._show(f"round {round.number:,} of {self._run.rounds:,}")

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Show the result in place of the progress."""
        text = " · ".join(f"{label} {value}" for label, value in summary_lines(summary))
        self._show(text)

    def _show(self, status: str) -> None:
        from IPython.display import HTML

        if self._handle is not None:
            self._handle.update(HTML(self._html(status)))

    def _html(self, status: str) -> str:
        assert self._run is not None
        header = "".join(
            f"<tr><td>{escape(label)}</td><td>{escape(text)}</td></tr>" for label, text in header_lines(self._run)
        )
        names = "".join(f"<th>{escape(name)}</th>" for name in (self._rows[-1] if self._rows else ()))
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.values()) + "</tr>"
            for row in self._rows[-MAX_ROWS:]
        )
        notices = "".join(f"<p>{escape(notice)}</p>" for notice in self._notices[-3:])
        return f"<table>{header}</table><table><tr>{names}</tr>{rows}</table>{notices}<p>{escape(status)}</p>"
