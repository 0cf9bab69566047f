"""``python -m fedlearn.deploy.submit``: the simulator's words, carried out by real nodes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_object

from fedlearn.core.command_line import CommandParser, UsageError, command_parser, exit_code
from fedlearn.deploy.run_log import Follower
from fedlearn.engines.deployed import grid
from fedlearn.runner.callbacks import build_callbacks
from fedlearn.runner.compat import command_line_parser
from fedlearn.runner.compose import Job, compose
from fedlearn.runner.config import build_plan
from fedlearn.runner.run_config import config_to_dict
from fedlearn.runner.start import main as simulate
from fedlearn.runner.start import parse_args as simulation

DEFAULT_COORDINATOR, DEFAULT_KEYS = "localhost:8000", Path("keys/operator")
OUTPUTS = "outputs"  # what a simulation puts in front of its folder; here it is the coordinator's to choose


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 done, 2 bad configuration, 3 failed, 130 stopped with a checkpoint."""
    parser = build_parser()

    def submit() -> int:
        args, settings = parser.parse_known_args(argv)
        if args.help:
            parser.print_help()
            return simulate(["--help"])
        return _submit(args, settings)

    return exit_code(submit)


def build_parser() -> CommandParser:
    """Return the parser of the options that a simulation does not have."""
    parser = command_parser(
        "fedlearn.deploy.submit",
        "Run an experiment at the nodes of a federation, and show its rounds.",
        epilog="settings: as in a simulation, see below",
        passes_on=command_line_parser(),
        add_help=False,
    )
    parser.add_argument("--coordinator", default=DEFAULT_COORDINATOR, metavar="HOST:PORT")
    parser.add_argument("--keys", type=Path, default=DEFAULT_KEYS, help="the operator's part of the keys")
    parser.add_argument("--resume", metavar="FOLDER", help="resume a run that was stopped; rounds=100 is possible")
    parser.add_argument("--follow", type=int, metavar="ID", help="follow a run that was submitted before")
    parser.add_argument(
        "--reconnect-timeout", type=float, default=120.0, help="seconds to wait for a coordinator that is lost"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help, and the settings")
    return parser


def _submit(args: argparse.Namespace, words: Sequence[str]) -> int:
    command = shlex.join(["python", "-m", "fedlearn.deploy.submit", *_place(args)])
    resume_command = f"{command} --resume {{folder}}"
    follower = Follower(args.coordinator, args.keys, args.reconnect_timeout, resume_command=resume_command)
    if args.follow is not None:
        return follower.follow(args.follow)
    if args.resume is not None:
        return follower.resume_run(args.resume, words)
    return follower.run({**compose_request(words), "rerun_command": f"{command} {shlex.join(words)}".rstrip()})


def _place(args: argparse.Namespace) -> list[str]:
    """The options that say where the coordinator is, as far as they were needed."""
    place = ["--coordinator", args.coordinator] if args.coordinator != DEFAULT_COORDINATOR else []
    return place + (["--keys", str(args.keys)] if args.keys != DEFAULT_KEYS else [])


def compose_request(overrides: Sequence[str]) -> dict[str, Any]:
    """Settings, folder and whether the folder was chosen, from words that have been checked as the simulator does.

    Raises:
        FedlearnError: a word means nothing, a setting is out of range, or it asks for a simulation.
    """
    chosen = any(word.startswith("engine=") for word in overrides)
    args = simulation(overrides if chosen else ["engine=grid", *overrides])
    (job,) = compose(args) if not args.multirun else [None]
    if job is None or job.is_sweep:
        raise UsageError("-m asks for several runs\n  expected  one at a time\n  try       submit once for each")
    build_plan(job.cfg)
    target = job.cfg.engine["_target_"]
    if get_object(target) is not grid:  # the coordinator has no other engine
        name = target.rpartition(".")[2]
        raise UsageError(f"engine={name} is for simulations\n  expected  engine=grid\n  try       no engine=... at all")
    build_callbacks(job.cfg)
    return {"settings": config_to_dict(job.cfg), "folder": _folder(job), "chosen": job.chosen}


def _folder(job: Job) -> str:
    """Where the coordinator is to leave the run, seen from the folder where it keeps all of them."""
    parts = job.folder.parts
    return str(Path(*parts[1:])) if not job.chosen and parts[0] == OUTPUTS else str(job.folder)


if __name__ == "__main__":
    sys.exit(main())
