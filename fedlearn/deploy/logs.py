"""Show the output of a run, and follow it: ``python -m fedlearn.deploy.logs RUN``."""

from __future__ import annotations

import json as json_format
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlearn.core.command_line import DONE, CommandParser, run_command
from fedlearn.core.plain_text import plain_text
from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.control_options import add_json_option, control_parser
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient
from fedlearn.deploy.remote_runs import find_run
from fedlearn.deploy.run_log import FLOWER_LOG_LINE

PAUSE_S = 3.0  # seconds without a line after which the present output is complete


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = control_parser(
        "fedlearn.deploy.logs",
        "Show the output of a run.",
        epilog="exit codes: 0; 2 no such run or no connection",
        has_run=True,
    )
    parser.add_argument("--follow", action="store_true", help="wait for further lines until the run ends")
    add_json_option(parser, "print one JSON object per line of the output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 without such a run or without a connection."""
    return run_command(build_parser(), show_log, argv)


def show_log(*, run: str, coordinator: str, keys: Path, follow: bool, json: bool) -> int:
    """Print the output of a run, and return the exit code.

    Raises:
        FedlearnError: No such run.
        ConnectionProblem: The coordinator cannot be reached, or refuses the token.
    """
    control = CoordinatorClient(coordinator, keys)
    try:
        found = find_run(control.run_states(), run)
        for line in _lines(control, found.id, follow=follow and found.status != "finished"):
            text = json_format.dumps({"run": found.name, "line": plain_text(line)}) if json else line
            sys.stdout.write(f"{plain_text(text, keep_styles=not json)}\n")
            sys.stdout.flush()
    finally:
        control.close()
    return DONE


def _lines(control: CoordinatorClient, number: int, *, follow: bool) -> Iterator[str]:
    """Yield the lines of the output. The log of a running run has no end, so a thread reads it."""
    pieces = queue.Queue[str | Exception | None]()

    def read() -> None:
        try:
            for text, _ in control.log(number):
                pieces.put(text)
            pieces.put(None)
        except Exception as error:
            pieces.put(error)

    threading.Thread(target=read, daemon=True).start()
    rest = ""
    while True:
        try:
            piece = pieces.get(timeout=None if follow else PAUSE_S)
        except queue.Empty:
            piece = None
        if isinstance(piece, ConnectionProblem):
            raise piece
        if not isinstance(piece, str):
            break
        *lines, rest = (rest + piece).split("\n")
        yield from (line for line in lines if not FLOWER_LOG_LINE.match(line))
    if rest:
        yield rest


if __name__ == "__main__":
    sys.exit(main())
