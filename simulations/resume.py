"""``python -m simulations.resume FOLDER``: resume a run that was stopped, with the result of an uninterrupted run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import command_parser, run_command
from fedlearn.runner.resume import CHANGEABLE_SETTINGS, resume


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the same exit codes as ``simulations.run``."""
    parser = command_parser(
        "simulations.resume",
        "Resume a run from its last checkpoint, in the same folder, with the same result.",
        epilog=f"settings that may change: {', '.join(CHANGEABLE_SETTINGS)}",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the run")
    parser.add_argument(
        "settings", nargs="*", default=[], metavar="setting=value", help="e.g. rounds=100 to train for longer"
    )
    return run_command(parser, lambda folder, settings: resume(folder, settings).exit_code, argv)


if __name__ == "__main__":
    sys.exit(main())
