"""Show a run: a header, then a table on a terminal, or one plain line per round on a pipe."""

from __future__ import annotations

import os
import pdb
import sys
from collections.abc import Callable, Mapping
from functools import cached_property, wraps
from math import isnan
from textwrap import indent
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.formatting import (
    failure_notice,
    format_epsilon,
    format_metric,
    header_lines,
    human_bytes,
    human_seconds,
    relative_path,
    summary_lines,
)
from fedlearn.callbacks.run_history import totals
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.metrics import higher_is_better
from fedlearn.core.records import Round
from fedlearn.errors import is_count, require

COLUMN_WIDTHS = (6, 9, 11, 12, 9, 10, 5, 8)  # characters; a row and its note fit into 80 characters
MAX_ROWS = 20
MAX_HEADER_WIDTH = 100


def _until_pipe_closes(method: Callable[..., None]) -> Callable[..., None]:
    """Stop the output, but not the run, if the reader closes the pipe (``| head``)."""

    @wraps(method)
    def call(console: Console, *arguments: Any) -> None:
        if console._pipe_closed:
            return
        try:
            method(console, *arguments)
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit):  # rich raises SystemExit for a broken pipe
            console._pipe_closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the exit of Python fails

    return call


class Console(Callback):
    """Show a run on standard output.

    On a terminal, text that other callbacks print appears above the progress line.

    Args:
        file: output stream; None is standard output.
        terminal: True draws for a terminal, False for a pipe; None detects the kind of the stream.
        width: characters per line, >= 1; None detects the width of the terminal.
        live: True shows a progress line on a terminal. Use False if the output passes through a log.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        terminal: bool | None = None,
        width: int | None = None,
        live: bool = True,
    ) -> None:
        flags = terminal is None or isinstance(terminal, bool)
        require(flags, "terminal", terminal, "true, false or null", "terminal=null")
        require(width is None or is_count(width), "width", width, "a whole number >= 1, or null", "width=null")
        require(isinstance(live, bool), "live", live, "true or false", "live=true")
        self._live = live
        self._pipe_closed = False
        self._file, self._terminal, self._width = file, terminal, width
        self._run: RunInfo | None = None
        self._progress: Progress | None = None
        self._breakpoint_hook: Callable[..., Any] | None = None
        self._task = TaskID(0)
        self._sent = 0
        self._num_failures = 0
        self._due = 1
        self._pending: Round | None = None

    @cached_property
    def _out(self) -> Terminal:
        return Terminal(
            file=self._file, force_terminal=self._terminal, width=self._width, highlight=False, markup=False
        )

    @_until_pipe_closes
    def on_start(self, run: RunInfo) -> None:
        """Print the header of the run. On a terminal, print the column names, too."""
        self._run = run
        before = totals(run.history)
        self._sent = before["bytes_up"] + before["bytes_down"]
        self._due = run.start_round + 1
        if not self._out.is_terminal:
            lines = [f"{label:<10} {text}".replace("\n", f"\n{'':<10} ") for label, text in header_lines(run)]
            self._plain("\n".join([_title(), *lines]))
            return
        self._out.print(_panel(run, min(self._out.width, MAX_HEADER_WIDTH)))
        self._out.print(Text(_row(table_header(run)), style="bold"), no_wrap=True, overflow="ignore", crop=False)
        self._progress = _progress(self._out)
        self._task = self._progress.add_task("", total=run.rounds, completed=run.start_round)
        if self._live:
            self._progress.start()
            self._breakpoint_hook, sys.breakpointhook = sys.breakpointhook, self._enter_debugger

    @_until_pipe_closes
    def on_round(self, round: Round) -> None:
        """Show the round. On a terminal, about twenty rounds have a row. Other rounds advance the progress line."""
        run = self._started()
        self._sent += round.bytes_up + round.bytes_down
        self._report_failures(round, run)
        if self._progress is None:
            self._plain(plain_line(round, run, self._sent))
            return
        self._progress.update(self._task, completed=round.number)
        step = row_interval(run.rounds)
        self._pending = round
        delay = 0 if round.evaluation or step == 1 else step  # prefer an evaluated round for the row
        if round.number == run.rounds or round.number >= self._due + delay:
            self._show(round, run)
            self._due = (round.number // step + 1) * step

    @_until_pipe_closes
    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Print the result, the paths of the files, and the commands that repeat and resume the run."""
        run = self._started()
        if self._pending is not None:
            self._show(self._pending, run)
        self.close()
        lines = [*summary_lines(summary), ("saved", relative_path(run.folder))]
        report = run.folder / "report.html"
        lines += [("report", relative_path(report))] if report.exists() else []
        lines += [("again", run.rerun_command)] if run.rerun_command else []
        is_resumable = summary["status"] in ("stopped", "failed") and run.resume_command
        lines += [("resume", run.resume_command)] if is_resumable else []
        self._plain("\n" * self._out.is_terminal + "\n".join(f" {label:<9} {text}" for label, text in lines))

    @_until_pipe_closes
    def close(self) -> None:
        """Remove the progress line from the terminal."""
        if self._progress is not None:
            self._progress.stop()
        if self._breakpoint_hook is not None:
            sys.breakpointhook, self._breakpoint_hook = self._breakpoint_hook, None

    def _enter_debugger(self, *args: Any, **options: Any) -> Any:
        """Remove the progress line, which would draw over the prompt, and open the debugger of the user."""
        hook, is_pdb = self._breakpoint_hook, not os.environ.get("PYTHONBREAKPOINT")
        self.close()
        if hook is sys.__breakpointhook__ and is_pdb:  # in the frame of breakpoint(), not in this frame
            return pdb.Pdb().set_trace(sys._getframe().f_back)
        return hook(*args, **options) if hook else None

    def _started(self) -> RunInfo:
        if self._run is None:
            raise RuntimeError("on_start was not called: call it before the other methods")
        return self._run

    def _show(self, round: Round, run: RunInfo) -> None:
        note = " compiled" if run.framework == "jax" and round.number == run.start_round + 1 else ""
        row = Text(_row(table_row(round, run, self._sent)) + note)
        self._out.print(row, no_wrap=True, overflow="ignore", crop=False)
        self._pending = None

    def _report_failures(self, round: Round, run: RunInfo) -> None:
        if not round.failures:
            return
        notice, trace = failure_notice(round, run), round.failures[0].traceback
        if self._num_failures == 0 and trace:
            self._plain(
                f"{notice}\n{indent(trace.rstrip(), '   ')}\n   (later failures are shown without traceback)", "red"
            )
        else:
            self._plain(_cut(notice, self._out.width) if self._out.is_terminal else notice, "yellow")
        self._num_failures += len(round.failures)

    def _plain(self, text: str, style: str = "") -> None:
        """Print text. Replace characters that the encoding of the stream lacks, so that they do not end the run."""
        encoding = self._out.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        self._out.print(Text(text, style=style), soft_wrap=True)


def table_header(run: RunInfo) -> list[str]:
    """Return the names of the columns. With a system model, the virtual clock replaces the wall-clock time."""
    time = "clock" if run.system else "time"
    return ["round", "loss", run.main_metric, "worst 10 %", "clients", "sent", "ε", time]


def table_row(round: Round, run: RunInfo, sent_bytes: int) -> list[str]:
    """Return one row. ``sent_bytes`` is the total payload so far in bytes, in both directions."""
    clients = f"{round.num_updates}/{len(round.cohort)}"
    return [
        str(round.number),
        *_scores(round, run),
        clients,
        human_bytes(sent_bytes),
        _epsilon(round),
        human_seconds(round.clock if run.system and round.clock is not None else round.seconds),
    ]


def plain_line(round: Round, run: RunInfo, sent_bytes: int) -> str:
    """Return one line on a round, for a pipe or a log. ``sent_bytes`` is as in `table_row`."""
    loss, main, worst = _scores(round, run)
    scores = f"loss {loss}  {run.main_metric} {main}  worst 10 % {worst}  " if round.evaluation else ""
    if round.evaluation and round.evaluation.personal:
        main = run.main_metric
        scores += f"personal {format_metric(main, round.evaluation.personal.pooled[main])}  "
    clients = f"clients {round.num_updates}/{len(round.cohort)}"
    spent = f"  epsilon {_epsilon(round)}" if round.privacy else ""
    clock = "" if round.clock is None else f"  clock {human_seconds(round.clock)}"
    progress = f"{clients}  sent {human_bytes(sent_bytes)}{spent}{clock}  time {human_seconds(round.seconds)}"
    return f"round {round.number}/{run.rounds}  {scores}{progress}"


def _epsilon(round: Round) -> str:
    return format_epsilon(round.privacy and round.privacy.value)


def _scores(round: Round, run: RunInfo) -> tuple[str, str, str]:
    evaluation, main = round.evaluation, run.main_metric
    if evaluation is None:
        return "–", "–", "–"
    is_good_high = higher_is_better(main, evaluation.lower_is_better)
    worst = evaluation.worst(main, higher_is_better=is_good_high)
    return (
        format_metric("loss", evaluation.pooled["loss"]),
        format_metric(main, evaluation.pooled[main]),
        "–" if isnan(worst) else format_metric(main, worst),
    )


def row_interval(rounds: int) -> int:
    """Return the number of rounds between two rows of the table.

    The interval is the smallest of 1, 2, 5, 10, 20, 50, ... that gives at most twenty rows.

    >>> [row_interval(rounds) for rounds in (5, 20, 21, 100, 1000)]
    [1, 1, 2, 5, 50]
    """
    step, factors = 1, (2.0, 2.5, 2.0)
    number = 0
    while rounds / step > MAX_ROWS:
        step, number = int(step * factors[number % 3]), number + 1
    return step


def _title() -> str:
    import fedlearn

    return f"fedlearn {getattr(fedlearn, '__version__', '')}".rstrip()


def _panel(run: RunInfo, width: int) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in header_lines(run):
        grid.add_row(label, Text(text))
    return Panel(grid, title=_title(), title_align="left", width=width, border_style="dim")


def _progress(out: Terminal) -> Progress:
    bar = BarColumn(bar_width=30, complete_style="default", finished_style="default")
    count = TextColumn("round {task.completed:.0f} of {task.total:.0f}", style="dim")
    return Progress(SpinnerColumn(), count, bar, TimeRemainingColumn(), console=out, transient=True)


def _cut(text: str, width: int) -> str:
    return text if len(text) < width else f"{text[: width - 2]}…"


def _row(texts: list[str]) -> str:
    return "".join(text.rjust(width) for text, width in zip(texts, COLUMN_WIDTHS, strict=True))
