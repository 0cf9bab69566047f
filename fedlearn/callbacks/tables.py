"""Format tables for the terminal and for Markdown pages.

A table is a sequence of rows of text; the first row has the column names.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

UNLIMITED = 1_000_000  # characters in a line of a pipe
MIN_COLUMN_WIDTH = 4  # one wide character and the space between columns


def print_table(rows: Sequence[Sequence[str]], *, num_text_columns: int = 1) -> None:
    """Print a table. On a terminal, cells are folded to its width; in a file or a pipe, lines are complete."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    text = format_table(rows, num_text_columns=num_text_columns, width=width)
    encoding = sys.stdout.encoding or "utf-8"  # characters that the terminal lacks must not end a command
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))


def format_table(rows: Sequence[Sequence[str]], *, num_text_columns: int = 1, width: int | None = None) -> str:
    """Return a table as aligned lines without borders.

    Args:
        rows: rows of equal length; the first row has the column names.
        num_text_columns: number of columns, from the left, that are aligned to the left; default 1. The other columns
            are aligned to the right.
        width: characters per line, >= 1; longer cells continue in the next line. None is unlimited.

    >>> print(format_table([("clinic", "size"), ("東京", "12"), ("Lyon", "3")]), end="")
    clinic  size
    東京      12
    Lyon       3
    """
    head, *body = rows
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for column, name in enumerate(head):
        justify = "left" if column < num_text_columns else "right"
        table.add_column(_plain(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in body:
        table.add_row(*map(_plain, row))
    lines = io.StringIO()
    width = max(width or UNLIMITED, MIN_COLUMN_WIDTH * len(head))
    Console(file=lines, width=width, color_system=None, legacy_windows=False).print(table)
    return "".join(f"{line.rstrip()}\n" for line in lines.getvalue().rstrip("\n").split("\n"))


def _plain(cell: str) -> Text:
    """Return a cell without control characters: names from data may contain commands for terminals."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in cell))


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    r"""Return a table in Markdown; line breaks in cells become spaces, and bars are escaped.

    >>> print(markdown_table([("rule", "a|b"), ("krum", "3")]), end="")
    | rule | a\|b |
    | --- | --- |
    | krum | 3 |
    """
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(map(_markdown_cell, line))} |\n" for line in lines)


def _markdown_cell(text: str) -> str:
    return " ".join(text.splitlines()).replace("|", r"\|")
