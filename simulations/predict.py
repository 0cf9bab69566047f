"""``python -m simulations.predict RUN --data FILE``: predict new examples with the model of a run, one line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import command_parser, read_settings, run_command
from simulations.analysis.prediction import write_predictions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 2 for a folder without a model or a file without examples."""
    parser = command_parser("simulations.predict", "Predict new examples with the model of a run.")
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--data", type=Path, required=True, help="file of examples, or folder of images")
    parser.add_argument(
        "settings",
        nargs="*",
        default=[],
        metavar="setting=value",
        help="checkpoint=last, checkpoint=best or checkpoint=ROUND",
    )
    parser.add_argument("--out", type=Path, help="CSV file to write; default: standard output")
    return run_command(parser, predict_examples, argv)


def predict_examples(folder: Path, data: Path, *, settings: Sequence[str], out: Path | None) -> int:
    """Write predictions of the model of a checkpoint, and return the exit code."""
    options = read_settings(settings, {"checkpoint": "best"})
    return write_predictions(folder, data, out=out, checkpoint=options.get("checkpoint", "last"))


if __name__ == "__main__":
    sys.exit(main())
