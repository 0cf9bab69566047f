"""``python -m simulations.data list | fetch NAME | check NAME``: the scenarios' data sets, and where they are here.

Scenarios that ship with a dependency (digits, diabetes) have nothing to fetch and are not listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fedlearn.runner.exit_codes import exit_code
from fedlearn.runner.interrupt import terminate_as_interrupt
from simulations.datasets.registry import _asked_for


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; 0 done, 2 no such data set, 3 it cannot be had or is not here."""
    args = build_parser().parse_args(argv)
    terminate_as_interrupt()
    return exit_code(lambda: _asked_for(args))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m simulations.data", description="The data sets of the scenarios.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is, and where it is here")
    fetch = commands.add_parser("fetch", help="bring a data set here, unless it is here")
    fetch.add_argument("--base-url", help="a mirror of the official folder; FEDLEARN_MIRROR names one for all")
    check = commands.add_parser("check", help="what is known of a data set, and whether its files here are right")
    check.add_argument("--path", help="a folder with the files; without it where a scenario would look")
    for command in (fetch, check):
        command.add_argument("name", metavar="NAME", help="of a data set, as list shows it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
