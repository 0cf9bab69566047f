"""Show a data check: as a table in the terminal, as lines in the header of a run, and as a section of the report."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedlearn.advice import assignment
from fedlearn.callbacks.tables import UNLIMITED
from fedlearn.core.command_line import as_called
from fedlearn.data.data_check import ColumnSummary, DataCheck

DATA_CHECK_FILE = "data_check.json"
MAX_FLAGS_IN_HEADER = 5
MAX_NOTES_SHOWN = 30
HEAD = ("column", "taken as", "levels, or median (1 % to 99 %)", "missing", "by site")


def print_check(check: DataCheck) -> None:
    """Print a data check on standard output. In a file or a pipe, lines are complete."""
    out = _terminal()
    out.print(Text(headline(check), style="bold"))
    out.print()
    out.print(_column_table(check))
    out.print()
    for note in check.notes[:MAX_NOTES_SHOWN]:
        out.print(Text(f"note: {plain(note)}", style="dim"))
    if check.notes:
        out.print()
    out.print(Text(num_flags(check), style="bold"))
    for flag in check.short_flags:
        _print_advice(out, Text.assemble((f"{flag.kind}: ", "yellow"), plain(flag.message)), flag.advice)
    if len(check.suggested_ignore) > 1:
        advice = assignment("scenario.ignore", [*check.ignored, *check.suggested_ignore])
        _print_advice(out, Text("identifiers, texts, constants and leaking columns together"), advice)


def _print_advice(out: Terminal, message: Text, advice: str) -> None:
    """Print a message with a margin, and a line to type that is never folded."""
    out.print(Padding(message, (0, 0, 0, 2), expand=False))
    out.print(Text.assemble(("    try  ", "dim"), plain(as_called(advice))), soft_wrap=True)


def num_flags(check: DataCheck) -> str:
    """Return the number of flags as text."""
    return f"{len(check.flags) or 'no'} flag{'s' * (len(check.flags) != 1)}"


def print_line(text: str) -> None:
    """Print a line of text on standard output."""
    _terminal().print(Text(plain(text) if "\n" not in text else text), soft_wrap=True)


def _terminal() -> Terminal:
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else UNLIMITED
    return Terminal(file=sys.stdout, width=width, highlight=False, markup=False, force_terminal=is_terminal)


def headline(check: DataCheck) -> str:
    """Return source, size and sites of a check in one line."""
    sites = len(check.rows_by_site)
    size = f"{check.num_rows:,} {check.unit}, {len(check.columns)} columns"
    sample = f" · a sample of {check.num_checked:,} {check.unit} is checked" if check.is_sample else ""
    return f"{plain(check.source)} · {size} · {sites} site{'s' * (sites != 1)}{sample}"


def header_text(check: DataCheck) -> str:
    """Return the flags in a few lines, for the header of a run."""
    sample = f" in a sample of {check.num_checked:,} {check.unit}" if check.is_sample else ""
    if not check.flags:
        return f"{num_flags(check)}{sample}"
    lines = [plain(flag.message) for flag in check.short_flags[:MAX_FLAGS_IN_HEADER]]
    count = f"{num_flags(check)}{sample}, see {DATA_CHECK_FILE} or the report"
    return "\n".join([count, *(f"- {line}" for line in lines)])


def column_cells(column: ColumnSummary) -> tuple[str, str, str, str, str]:
    """Return the cells of a column in the table, in the order of `HEAD`."""
    missing = f"{column.num_missing:,} ({_percent(column.share_missing)})" if column.num_missing else "–"
    kind = f"{column.taken_as}, {plain(column.format)}" if column.format else column.taken_as
    return plain(column.name), kind, plain(column.content), missing, plain(column.by_site)


def report_section(folder: Path) -> Mapping[str, Any] | None:
    """Return the texts of the report's section on the data check; None if the run folder has no check."""
    check = read_data_check(folder)
    if check is None:
        return None
    return {
        "headline": headline(check),
        "head": HEAD,
        "columns": [column_cells(column) for column in check.columns],
        "notes": [*check.notes],
        "flags": [{"kind": flag.kind, "message": flag.message, "advice": flag.advice} for flag in check.short_flags],
    }


def check_as_json(check: DataCheck) -> str:
    """Return a data check as the text of its file."""
    return json.dumps(check.to_json(), indent=1, ensure_ascii=False) + "\n"


def read_data_check(folder: Path) -> DataCheck | None:
    """Return the data check of a run folder; None if it has none, or a damaged file."""
    try:
        return DataCheck.from_json(json.loads((folder / DATA_CHECK_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def plain(text: str) -> str:
    """Return a text without control characters: names from data may contain commands for terminals."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def _column_table(check: DataCheck) -> Table:
    flagged = {flag.column for flag in check.flags}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in HEAD:
        table.add_column(name, justify="right" if name == "missing" else "left", overflow="fold")
    for column in check.columns:
        style = "yellow" if column.name in flagged else ""
        name, *cells = column_cells(column)
        table.add_row(Text(name, style=style), *map(Text, cells))
    return table
