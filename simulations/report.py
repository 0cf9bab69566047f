"""``report.html``: one file, readable offline, that shows what a run did and how to repeat it.

Run ``python -m simulations.report RUN`` to draw it again from the files of a run folder; it needs nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.callbacks.report import write_report
from fedlearn.errors import FedlearnError


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m simulations.report RUN``: exit code 0, or 2 for a folder that is no run."""
    parser = argparse.ArgumentParser(prog="python -m simulations.report", description="Draw the report of a run again.")
    parser.add_argument("run", type=Path, help="the folder that the run saved")
    try:
        path = write_report(parser.parse_args(argv).run)
    except FedlearnError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
