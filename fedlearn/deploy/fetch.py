"""Download report, model and metrics of a run: ``python -m fedlearn.deploy.fetch RUN``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import DONE, CommandParser, run_command
from fedlearn.deploy.control_options import add_json_option, control_parser
from fedlearn.deploy.history import print_json
from fedlearn.deploy.processes import private_files
from fedlearn.deploy.remote_runs import RunClient, find_run, list_runs
from fedlearn.errors import FedlearnError, is_number, require


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = control_parser(
        "fedlearn.deploy.fetch",
        "Download the files of a run to a new folder: report, model, metrics and figures, without checkpoints.",
        epilog="exit codes: 0; 2 no such run, a run of another person, too many bytes, a changed file, no connection",
        has_run=True,
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="new folder; default: the name of the run")
    parser.add_argument("--max-gib", type=float, default=4.0, help="largest size of all files together, in GiB")
    add_json_option(parser, "print the list of files as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 refused or no connection."""
    return run_command(build_parser(), fetch_run, argv)


def fetch_run(*, run: str, coordinator: str, keys: Path, to: Path | None, max_gib: float, json: bool) -> int:
    """Download the files of a run, and return the exit code.

    Raises:
        FedlearnError: No such run, the folder exists, the files are too large, or a file was changed on the way.
        ConnectionProblem: The coordinator cannot be reached, or refuses the request.
    """
    require(is_number(max_gib, at_least=0), "--max-gib", max_gib, "a number of GiB >= 0", "--max-gib 4")
    found = find_run(list_runs(coordinator, keys), run)
    target = to or Path(Path(found.name or str(found.id)).name)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FedlearnError(f"{target} exists\n  expected  a new or an empty folder\n  advice    choose another --to")
    client = RunClient(coordinator, keys)
    try:
        files = client.files(found.folder)
        size = sum(file.size for file in files)
        expected = f"at most --max-gib={max_gib:g}"
        if not all(file.size >= 0 for file in files) or size > max_gib * 2**30:
            fix = f"--max-gib {size / 2**30 + 0.1:.1f}"
            raise FedlearnError(f"the run has {size / 2**30:.1f} GiB\n  expected  {expected}\n  try       {fix}")
        with private_files():
            for file in files:
                client.download(found.folder, file, target / file.path)
    finally:
        client.close()
    if json:
        print_json({"run": found.name, "folder": str(target), "files": [vars(file) for file in files]})
    else:
        sys.stdout.write(f"{len(files)} files, {size} bytes of run {found.name} are in {target}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
