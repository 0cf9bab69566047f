"""``python -m simulations.results``: run published experiments, and write the page ``docs/results.md``.

Without options, the command writes the page from the stored results. Run a row, or all rows of a table::

  python -m simulations.results --run flamby_heart/fedavg
  python -m simulations.results --run flamby_heart
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import command_parser, run_command
from simulations.published.run_rows import list_rows, run_rows, write_page


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 2 for an unknown row, or the exit code of the first run that failed."""
    parser = command_parser(
        "simulations.results", "Run published experiments, and write docs/results.md from the stored results."
    )
    parser.add_argument("--run", nargs="+", default=[], metavar="ROW", help="rows or tables, e.g. flamby_heart/fedavg")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="seeds of the rows to run; default: all")
    parser.add_argument("--again", action="store_true", help="run seeds that have a result, too")
    parser.add_argument("--list", action="store_true", help="list the rows and their commands")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder with results.md and results/")
    parser.add_argument("--runs", type=Path, default=Path("outputs/results"), help="folder for the run folders")
    return run_command(parser, _results, argv)


def _results(
    *, run: Sequence[str], seeds: Sequence[int] | None, again: bool, list: bool, docs: Path, runs: Path
) -> int:
    if list:
        return list_rows()
    return run_rows(run, seeds=seeds, again=again, docs=docs, runs=runs) or write_page(docs)


if __name__ == "__main__":
    sys.exit(main())
