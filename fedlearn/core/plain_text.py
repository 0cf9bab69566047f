"""Remove control characters from text of other parties, so that it is safe in logs, files and on terminals.

These characters are removed: the control characters C0 and C1, marks that change the direction of text, invisible
characters, and unpaired surrogates. Escape sequences of terminals start with a control character.
"""

from __future__ import annotations

import logging
import re

STYLE = re.compile(r"(\x1b\[[0-9;]{0,20}m)")  # escape sequence that sets only weight and colour


def plain_line(text: str, *, max_length: int = 200) -> str:
    """Return text as one line of printable characters, cut after ``max_length`` characters.

    >>> plain_line("red \\x1b[31m alert\\n second line")
    'red [31m alert second line'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * max_length]).split())[:max_length]


def plain_text(text: str, *, keep_styles: bool = False) -> str:
    r"""Return text without control characters, except line feeds and tabs.

    Args:
        text: text of another party.
        keep_styles: True keeps the escape sequences that set weight and colour of the following characters.

    >>> plain_text("one\x1b[2J\r\ntwo\ttabs")
    'one[2J\ntwo\ttabs'
    """
    parts = STYLE.split(text) if keep_styles else [text]  # in odd places: styles
    return "".join(part if i % 2 else _without_controls(part) for i, part in enumerate(parts))


class PlainFormatter(logging.Formatter):
    """Format log records without control characters. Further lines of a record are indented.

    So the text of another party can neither change a terminal nor imitate a line of the log.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return plain_text(super().format(record)).replace("\n", "\n  ")


def _without_controls(text: str) -> str:
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
