"""``python -m simulations.compare RUN ...``: compare settings over seeds, from the folders of runs.

Sweep first, then compare; runs that differ only in ``seed`` are grouped:

  python -m simulations.run -m strategy=fedavg,fedprox seed=1,2,3 hydra.sweep.dir=sweep
  python -m simulations.compare sweep --target 0.8
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import command_parser, run_command
from simulations.analysis.comparison import compare_runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 2 for folders without runs."""
    parser = command_parser(
        "simulations.compare",
        "Compare settings over seeds: a table, a figure (compare.png), compare.md and compare.json.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs or of sweeps")
    parser.add_argument("--metric", help="metric to compare, e.g. auc; default: main metric of the runs")
    parser.add_argument("--target", type=float, help="value of the metric, e.g. 0.8: adds rounds and bytes to reach it")
    parser.add_argument("--out", type=Path, help="folder for the files; default: the first RUN")
    return run_command(parser, compare_runs, argv)


if __name__ == "__main__":
    sys.exit(main())
