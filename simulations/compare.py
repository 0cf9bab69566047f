"""``python -m simulations.compare RUN ...``: which settings were better, over seeds, from the folders of runs.

Sweep first, then compare; runs that differ in nothing but the seed belong together:

  python -m simulations.run -m strategy=fedavg,fedprox seed=1,2,3 hydra.sweep.dir=sweep
  python -m simulations.compare sweep --target 0.8

Shapes: S runs of one setting (seeds), R evaluated rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.runner.exit_codes import exit_code
from simulations.analysis.comparison import _told


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says: 0 done, 2 for folders without runs."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.compare",
        description="Compares settings over seeds: a table, a figure (compare.png), compare.md and compare.json.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs or of sweeps")
    parser.add_argument("--metric", help="e.g. auc; the runs' main one without it")
    parser.add_argument("--target", type=float, help="of the metric, e.g. 0.8: rounds and bytes until it is reached")
    parser.add_argument("--out", type=Path, help="a folder for the files; the first RUN without it")
    args = parser.parse_args(argv)
    return exit_code(lambda: _told(args))


if __name__ == "__main__":
    sys.exit(main())
