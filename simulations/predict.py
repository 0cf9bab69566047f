"""``python -m simulations.predict RUN --data FILE``: predict new examples with the model of a run, one line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlearn.core.command_line import command_parser, read_settings, run_command
from fedlearn.runner.trained_model import BATCH_SIZE
from simulations.analysis.prediction import PredictionOptions, write_predictions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 2 for a folder without a model or an example that is not valid."""
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
    parser.add_argument("--id", action="append", default=[], metavar="COLUMN", help="column to copy; may be repeated")
    parser.add_argument("--client", metavar="NAME", help="client of a personal model; global for the global model")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="probability of the positive class above which it is predicted"
    )
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="examples in memory (%(default)s)")
    parser.add_argument("--allow-unknown", action="store_true", help="count unknown categories as missing")
    parser.add_argument("--allow-missing", action="store_true", help="count absent columns as missing")
    parser.add_argument("--base", metavar="PATH", help="folder or name of the pretrained model of the run")
    return run_command(parser, predict_examples, argv)


def predict_examples(
    folder: Path, data: Path, *, settings: Sequence[str], out: Path | None, id: Sequence[str], **options: Any
) -> int:
    """Write predictions of the model of a checkpoint, and return the exit code."""
    checkpoint = read_settings(settings, {"checkpoint": "best"}).get("checkpoint", "last")
    chosen = PredictionOptions(checkpoint=str(checkpoint), ids=tuple(id), **options)
    return write_predictions(folder, data, out=out, options=chosen)


if __name__ == "__main__":
    sys.exit(main())
