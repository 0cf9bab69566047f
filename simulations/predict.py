"""``python -m simulations.predict RUN --data FILE``: what a trained model says of new examples, one line each.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.runner.exit_codes import exit_code
from simulations.analysis.prediction import _told


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says: 0 done, 2 for a folder without a model or a file without examples."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.predict", description="Predicts with the model that a run has trained."
    )
    parser.add_argument("run", type=Path, help="the folder that the run saved")
    parser.add_argument("--data", type=Path, required=True, help="a file of examples, or a folder of images")
    parser.add_argument("--out", type=Path, help="a CSV file; standard output without it")
    args = parser.parse_args(argv)
    return exit_code(lambda: _told(args))


if __name__ == "__main__":
    sys.exit(main())
