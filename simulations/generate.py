"""``python -m simulations.generate RUN``: write text with the language model of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import DONE, command_parser, run_command
from simulations.analysis.generation import generate_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the same exit codes as ``simulations.run``."""
    parser = command_parser("simulations.generate", "Write text with the language model of a run.")
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="folder of a run with task=causal_lm, or of scenario=shakespeare"
    )
    parser.add_argument("--prompt", default="O ", help="beginning of the text, or a prompt (%(default)r)")
    parser.add_argument("--context", default="", help="further input of the prompt (%(default)r)")
    parser.add_argument("--length", type=int, default=300, help="largest number of new tokens (%(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.6,
        help="softmax temperature; 0 is greedy (%(default)s)",
    )
    parser.add_argument("--checkpoint", default="last", help="last, best or the number of a round (%(default)s)")
    parser.add_argument("--client", metavar="NAME", help="client of a personal model; global for the global model")
    parser.add_argument("--base", metavar="PATH", help="folder or name of the pretrained model of the run")
    return run_command(parser, print_text, argv)


def print_text(folder: Path, **options: object) -> int:
    """Print the text, and return the exit code."""
    sys.stdout.write(f"{generate_text(folder, **options)}\n")  # type: ignore[arg-type]
    return DONE


if __name__ == "__main__":
    sys.exit(main())
