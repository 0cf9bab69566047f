"""Stop a run of a federation from any terminal: ``python -m fedlearn.deploy.cancel RUN``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import DONE, CommandParser, run_command
from fedlearn.deploy.control_options import control_parser
from fedlearn.deploy.coordinator_side.app_bundle import REQUEST_KEY, build_app_bundle
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient
from fedlearn.deploy.remote_runs import find_run
from fedlearn.errors import FedlearnError


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = control_parser(
        "fedlearn.deploy.cancel",
        "Stop a run after its round. Its rounds are kept, and fedlearn.deploy.submit --resume continues it.",
        epilog="exit codes: 0 requested; 2 no such run, a run of another person, or no connection",
        has_run=True,
    )
    parser.add_argument("--now", action="store_true", help="stop in the middle of the round")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 requested, 2 no such run or no connection."""
    return run_command(build_parser(), cancel_run, argv)


def cancel_run(*, run: str, coordinator: str, keys: Path, now: bool) -> int:
    """Ask the coordinator to stop a run, and return the exit code.

    Raises:
        FedlearnError: the run does not exist or has ended.
        ConnectionProblem: the coordinator cannot be reached, or refuses the token.
    """
    control = CoordinatorClient(coordinator, keys)
    try:
        number = find_run(control.run_states(), run).id
        status = control.status(number)
        if status.finished:
            outcome = status.sub_status or "finished"
            raise FedlearnError(
                f"run {run} has ended: {outcome}\n  expected  a run in progress\n"
                "  try       python -m fedlearn.deploy.status"
            )
        if now or status.status in ("pending", "starting"):
            control.stop(number)
        else:
            control.start(build_app_bundle(), {REQUEST_KEY: json.dumps({"do": "stop", "run": number})})
    finally:
        control.close()
    moment = "at once" if now else "after its round"
    sys.stdout.write(f"run {run} stops {moment}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
