"""``python -m simulations.data list | fetch NAME | check NAME | inspect PATH``: manage data sets, and check files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlearn.core.command_line import CommandParser, command_parser, run_command
from simulations.datasets.registry import check_data_set, fetch_data_set, list_data_sets


def _inspect(**options: Any) -> int:
    from simulations.analysis.data_inspection import inspect_data  # the other subcommands start without Hydra

    return inspect_data(**options)


ACTIONS: Mapping[str, Callable[..., int]] = {
    "list": list_data_sets,
    "fetch": fetch_data_set,
    "check": check_data_set,
    "inspect": _inspect,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 2 for an unknown data set, or 3 if files are not available."""
    return run_command(build_parser(), manage_data_sets, argv)


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser("simulations.data", "List, download and verify data sets, or check files.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="list all data sets, and their place on this machine")
    fetch = commands.add_parser("fetch", help="download a data set unless it is on this machine")
    fetch.add_argument(
        "--base-url", help="mirror of the official folder; FEDLEARN_MIRROR sets a mirror of all data sets"
    )
    check = commands.add_parser("check", help="describe a data set and verify its files")
    check.add_argument("--path", help="folder with the files; default: same places as for a scenario")
    for command in (fetch, check):
        command.add_argument("name", metavar="NAME", help="name of a data set, as in list")
    inspect = commands.add_parser("inspect", help="check a file or folder before training; no data leave the machine")
    inspect.add_argument("path", metavar="PATH", help="file, folder, or hf://owner/name")
    inspect.add_argument(
        "settings", metavar="setting=value", nargs="*", help="settings of scenario=folder, e.g. target=sick"
    )
    inspect.add_argument("--json", dest="json_file", metavar="FILE", help="write the whole check, with row numbers")
    inspect.add_argument(
        "--write-schema", dest="schema_file", metavar="FILE", help="write types, formats and levels for scenario.schema"
    )
    inspect.add_argument("--strict", action="store_true", help="exit code 1 if there is a flag")
    return parser


def manage_data_sets(*, command: str, **options: Any) -> int:
    """Run one of the subcommands, and return the exit code."""
    return ACTIONS[command](**options)


if __name__ == "__main__":
    sys.exit(main())
