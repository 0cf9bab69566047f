"""``python -m simulations.sample RUN``: write text with the language model of a run, one character at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import DONE, command_parser, run_command
from simulations.analysis.sampling import sample_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the same exit codes as ``simulations.run``."""
    parser = command_parser("simulations.sample", "Write text with the language model of a run, by characters.")
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="folder of a run with a language model, e.g. scenario=shakespeare"
    )
    parser.add_argument("--start", default="O ", help="first characters of the text (%(default)r)")
    parser.add_argument("--length", type=int, default=300, help="number of sampled characters (%(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.6,
        help="softmax temperature; 0 takes the most likely character (%(default)s)",
    )
    return run_command(parser, print_sample, argv)


def print_sample(folder: Path, *, start: str, length: int, temperature: float) -> int:
    """Print the text, and return the exit code."""
    text = sample_text(folder, prompt=start, num_characters=length, temperature=temperature)
    sys.stdout.write(f"{text}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
