"""``python -m simulations.report RUN``: write ``report.html`` of a run again, from the files of its folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.callbacks.report import write_report
from fedlearn.core.command_line import DONE, command_parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 2 for a folder that is not a run folder."""
    parser = command_parser("simulations.report", "Write the report of a run again.")
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    return run_command(parser, print_report, argv)


def print_report(folder: Path) -> int:
    """Write the report, print its path, and return the exit code."""
    sys.stdout.write(f"{write_report(folder)}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
