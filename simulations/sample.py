"""``python -m simulations.sample RUN``: text that a run's model writes, one character after another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.runner.exit_codes import DONE, exit_code
from fedlearn.runner.interrupt import terminate_as_interrupt
from simulations.analysis.sampling import sample_text

# the scenario whose models write


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; exit codes as those of ``simulations.run``."""
    args = build_parser().parse_args(argv)
    terminate_as_interrupt()

    def act() -> int:
        sys.stdout.write(
            sample_text(args.run, prompt=args.start, num_characters=args.length, temperature=args.temperature) + "\n"
        )
        return DONE

    return exit_code(act)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m simulations.sample", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run of scenario=shakespeare")
    parser.add_argument("--start", default="O ", help="what the text begins with (%(default)r)")
    parser.add_argument("--length", type=int, default=300, help="characters to write (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 always takes the likeliest (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
