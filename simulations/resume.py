"""``python -m simulations.resume FOLDER``: go on with a run that was stopped, to the end it would have had."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.runner.exit_codes import exit_code
from fedlearn.runner.interrupt import terminate_as_interrupt
from fedlearn.runner.resume import CHANGEABLE_SETTINGS, resume


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; exit codes as those of ``simulations.run``."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.resume",
        description="Goes on with a run from its last checkpoint, in the same folder, to the same result.",
        epilog=f"settings that may change: {', '.join(CHANGEABLE_SETTINGS)}",
    )
    parser.add_argument("folder", type=Path, help="what the run named as saved")
    parser.add_argument("settings", nargs="*", help="e.g. rounds=100 to go on for longer")
    args = parser.parse_args(argv)
    terminate_as_interrupt()
    return exit_code(lambda: resume(args.folder, args.settings).exit_code)


if __name__ == "__main__":
    sys.exit(main())
