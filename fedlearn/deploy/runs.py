"""List the runs of a federation: ``python -m fedlearn.deploy.runs``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedlearn.core.command_line import DONE, CommandParser, run_command
from fedlearn.deploy.control_options import add_json_option, control_parser
from fedlearn.deploy.history import print_json
from fedlearn.deploy.remote_runs import RunClient, list_runs, read_progress
from fedlearn.deploy.status import describe_run, run_table

MAX_RUNS = 20  # runs in the table


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = control_parser(
        "fedlearn.deploy.runs",
        "List the runs of a federation, the newest first.",
        epilog="exit codes: 0; 2 if the coordinator cannot be reached",
    )
    parser.add_argument("--person", default="", help="only runs of this person")
    parser.add_argument("--all", action="store_true", help=f"show all runs instead of the newest {MAX_RUNS}")
    add_json_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 without a connection."""
    return run_command(build_parser(), show_runs, argv)


def show_runs(*, coordinator: str, keys: Path, person: str, all: bool, json: bool) -> int:
    """Print the runs and return the exit code.

    Raises:
        ConnectionProblem: The coordinator cannot be reached, or refuses the token.
    """
    runs = [run for run in list_runs(coordinator, keys) if person in ("", run.person)][: None if all else MAX_RUNS]
    client = RunClient(coordinator, keys)
    try:
        progress = read_progress(client, runs)
    finally:
        client.close()
    rows = [describe_run(run, progress) for run in runs]
    if json:
        print_json(rows)
    else:
        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
        console.print(run_table(rows) if rows else "no run yet: fedlearn deploy submit")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
