"""Write log lines with UTC time and without colours, as text or as JSON, for all processes of coordinator and node.

The environment variable `LOG_FORMAT_ENV` has the format, so that all child processes use the same one.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

from fedlearn.core.plain_text import PlainFormatter, plain_text

LOG_FORMAT_ENV = "FEDLEARN_LOG_FORMAT"
FORMATS = ("text", "json")
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STAMP = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)[.,](\d{3})Z? ?")  # time that a library writes itself
LEVEL = re.compile(r"(DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL)\s*:?\s+(?:\[([\w.]+)\]\s*)?")
MAX_LINE = 16_384  # characters; a longer line is cut


def add_log_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--log-format``; `use_log_format` applies it."""
    parser.add_argument("--log-format", choices=FORMATS, help="format of the log files; default: text")


def use_log_format(name: str | None) -> None:
    """Use a format in this process and in its children; None keeps the format of the environment."""
    if name is not None:
        os.environ[LOG_FORMAT_ENV] = name


def log_format() -> str:
    """Return the format of this process."""
    return "json" if os.environ.get(LOG_FORMAT_ENV) == "json" else "text"


def configure_logging() -> None:
    """Write the log records of this process to the standard error, with UTC time."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format() == "json" else UtcFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class UtcFormatter(PlainFormatter):
    """Format records as text: ``2026-03-01T10:00:00.123Z INFO name: message``."""

    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.converter = time.gmtime


class JsonFormatter(logging.Formatter):
    """Format a record as one JSON object: time, level, logger and message, with the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        moment = datetime.fromtimestamp(record.created, UTC)
        message = plain_text(COLOURS.sub("", record.getMessage()))
        fields = {"level": record.levelname, "logger": record.name, "message": message}
        if record.exc_info:
            fields["exception"] = plain_text(self.formatException(record.exc_info))
        return to_json(moment, fields)


class StampedStream(io.TextIOBase):
    """A stream that writes each line with time and level, without colours; for libraries with other formats.

    Args:
        stream: stream of the lines.
        name: ``text`` or ``json``.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._format, self._rest = stream, name, ""

    def write(self, text: str) -> int:
        """Write all complete lines, and keep the rest."""
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > MAX_LINE:
            lines, self._rest = [*lines, self._rest], ""
        for line in filter(str.strip, lines):
            self._stream.write(f"{stamp(line, self._format)}\n")
        return len(text)

    def flush(self) -> None:
        """Write the complete lines to the disk; an incomplete line waits for its end."""
        self._stream.flush()

    def fileno(self) -> int:
        """Return the number of the file."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Return False, so that no library writes colours."""
        return False


def stamp_output() -> None:
    """Write all further lines of this process with time and level."""
    name = log_format()
    sys.stdout, sys.stderr = StampedStream(sys.stdout, name), StampedStream(sys.stderr, name)


def stamp(line: str, name: str) -> str:
    """Return a line of a library with UTC time and level.

    A time at the start of the line is kept if the library writes it in UTC, as Flower and uvicorn do.
    """
    text = plain_text(COLOURS.sub("", line[:MAX_LINE]))
    moment, level, logger = datetime.now(UTC), "INFO", ""
    if found := STAMP.match(text):
        moment = datetime.fromisoformat(f"{found[1]}T{found[2]}.{found[3]}+00:00")
        text = text[found.end() :]
    if found := LEVEL.match(text):
        level, logger = ("WARNING" if found[1] == "WARN" else found[1]), found[2] or ""
        text = text[found.end() :]
    if name == "json":
        return to_json(moment, {"level": level, "logger": logger, "message": text})
    return f"{_time(moment)} {level} {logger + ': ' if logger else ''}{text}"


def to_json(moment: datetime, fields: Mapping[str, str]) -> str:
    """Return a log line as a JSON object."""
    return json.dumps({"time": _time(moment), **fields}, ensure_ascii=False)


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
