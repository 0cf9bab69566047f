"""Check that a coordinator, a node or a trainer of this machine works: ``python -m fedlearn.deploy.check PATH``.

It is the health check of containers and service managers. It needs no key, and sends nothing over the network. It reads
the results of the probes that the processes themselves repeat, see `fedlearn.deploy.supervision`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlearn.core.command_line import DONE, FAILED, CommandParser, UsageError, command_parser, run_command
from fedlearn.core.plain_text import plain_line
from fedlearn.deploy.node_side.messenger_state import STATE_FILE, read_problem

NODE_PARTS = ("messenger", "coordinator", "trainer")
# files that the processes of a coordinator write every few seconds while they work
COORDINATOR_FILES = {"SuperLink": "connections.json", "SuperExec": "run_processes.json"}
MAX_AGE_S = 30.0  # seconds; the processes are restarted after a minute without work


def problems_of(path: Path) -> Mapping[str, str]:
    """Return the problem of each part; empty if it works.

    Args:
        path: state folder of a coordinator or of a node, or socket of a trainer.

    Raises:
        UsageError: The path is none of these.
    """
    if path.is_socket():
        from fedlearn.deploy.node_side.trainer_client import TrainerClient  # it loads gRPC

        return {"trainer": TrainerClient(path).problem()}
    if (path / STATE_FILE).is_file():
        return {part: read_problem(path, part) for part in NODE_PARTS}
    if any((path / file).is_file() for file in COORDINATOR_FILES.values()):
        return {part: _age_problem(path / file) for part, file in COORDINATOR_FILES.items()}
    expected = "the state folder of a coordinator or a node that has started, or the socket of a trainer"
    raise UsageError(f"{path} has no state\n  expected  {expected}\n  try       python -m fedlearn.deploy.check node")


def _age_problem(file: Path) -> str:
    try:
        age_s = time.time() - file.stat().st_mtime
    except OSError:
        return "it has not started yet"
    return "" if age_s < MAX_AGE_S else f"it has not worked for {age_s:.0f} s"


def check(*, path: Path) -> int:
    """Print a line for each part, and return the exit code."""
    problems = problems_of(path)
    for part, problem in problems.items():
        sys.stdout.write(f"{part:<12}{plain_line(problem) or 'works'}\n")
    return FAILED if any(problems.values()) else DONE


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "fedlearn.deploy.check",
        "Check that a coordinator, a node or a trainer of this machine works.",
        epilog="exit codes: 0 all parts work; 2 no state at this path; 3 a part does not work",
    )
    expected = "state folder of a coordinator or of a node, or socket of a trainer"
    parser.add_argument("path", type=Path, metavar="PATH", help=expected)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 all parts work, 2 no state, 3 a part does not work."""
    return run_command(build_parser(), check, argv)


if __name__ == "__main__":
    sys.exit(main())
