"""Define the options of the commands that ask a coordinator."""

from __future__ import annotations

from pathlib import Path

from fedlearn.core.command_line import CommandParser, command_parser

DEFAULT_COORDINATOR = "localhost:8000"
DEFAULT_KEYS = Path("keys/operator")


def control_parser(module: str, description: str, *, epilog: str, has_run: bool = False) -> CommandParser:
    """Return the parser of a command that asks a coordinator, with the options of the connection.

    Args:
        module: module of the command.
        description: first sentence of the help.
        epilog: last line of the help: the exit codes.
        has_run: whether the first argument is a run.
    """
    parser = command_parser(module, description, epilog=epilog)
    if has_run:
        help = "name, number or folder of the run, from fedlearn.deploy.runs"
        parser.add_argument("run", metavar="RUN", help=help)
    add_connection_options(parser)
    return parser


def add_connection_options(parser: CommandParser) -> None:
    """Add the options ``--coordinator`` and ``--keys``."""
    parser.add_argument("--coordinator", default=DEFAULT_COORDINATOR, metavar="HOST:PORT", help="address")
    parser.add_argument("--keys", type=Path, default=DEFAULT_KEYS, help="folder with the operator's keys")


def add_json_option(parser: CommandParser, help: str = "print JSON") -> None:
    """Add the option ``--json``, with which a command prints JSON."""
    parser.add_argument("--json", action="store_true", help=help)
