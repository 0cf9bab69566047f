"""``python -m simulations.privacy_utility FOLDER ...``: what privacy costs, from the runs of a sweep.

Sweep first, with runs without protection to compare with, if you like; then draw:

  python -m simulations.run -m experiment=flamby_heart_dp privacy.epsilon=0.1,1,5 seed=1,2,3 hydra.sweep.dir=sweep
  python -m simulations.privacy_utility sweep
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.callbacks import figures
from fedlearn.callbacks.report import DOTS_PER_INCH
from fedlearn.errors import FedlearnError
from simulations.analysis.privacy_utility import FIGURE_FILE, plot_privacy_utility, read_points, table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for folders without runs."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.privacy_utility", description="Draws the main metric of runs against epsilon."
    )
    parser.add_argument("folder", type=Path, nargs="+", help="of a sweep, or of single runs")
    folders = parser.parse_args(argv).folder
    try:
        found = read_points(folders)
        with figures.style():
            figure = plot_privacy_utility(found)
            figure.savefig(folders[0] / FIGURE_FILE, dpi=DOTS_PER_INCH, facecolor="white")
    except FedlearnError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{table(found)}\n saved     {folders[0] / FIGURE_FILE}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
