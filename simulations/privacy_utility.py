"""``python -m simulations.privacy_utility FOLDER ...``: draw the main metric against epsilon, from the runs of a sweep.

Sweep first, then draw. The sweep may also contain unprotected runs, for comparison:

  python -m simulations.run -m experiment=flamby_heart_dp privacy.epsilon=0.1,1,5 seed=1,2,3 hydra.sweep.dir=sweep
  python -m simulations.privacy_utility sweep
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import command_parser, run_command
from simulations.analysis.privacy_utility import write_privacy_utility


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 2 for folders without runs."""
    parser = command_parser("simulations.privacy_utility", "Draw the main metric of runs against epsilon.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="folders of sweeps or of single runs")
    return run_command(parser, write_privacy_utility, argv)


if __name__ == "__main__":
    sys.exit(main())
