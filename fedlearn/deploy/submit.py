"""Run an experiment at real nodes: ``python -m fedlearn.deploy.submit``, with the settings of a simulation."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import get_object

from fedlearn.core.command_line import CommandParser, UsageError, command_parser, exit_code
from fedlearn.deploy.config_file import add_config_option
from fedlearn.deploy.control_options import DEFAULT_COORDINATOR, DEFAULT_KEYS, add_connection_options
from fedlearn.deploy.run_log import Follower
from fedlearn.engines.deployed import grid
from fedlearn.runner.callbacks import build_callbacks
from fedlearn.runner.compat import command_line_parser
from fedlearn.runner.compose import Job, compose
from fedlearn.runner.named_settings import name_settings, resolve_settings, user_builders
from fedlearn.runner.plan import build_plan
from fedlearn.runner.registry import Registry, installed_registry
from fedlearn.runner.run_config import config_to_dict
from fedlearn.runner.start import main as simulate
from fedlearn.runner.start import parse_args as parse_simulation_args

OUTPUTS = "outputs"  # first part of a simulation's folder; here the coordinator chooses this folder (--runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Returns:
        0 done, 2 bad configuration or no connection, 3 failed, 130 stopped with a checkpoint.
    """
    parser = build_parser()

    def submit() -> int:
        args, settings = parser.parse_known_args(argv)
        if args.help:
            parser.print_help()
            return simulate(["--help"])
        return _submit(args, settings)

    return exit_code(submit)


def build_parser() -> CommandParser:
    """Return the parser of the options that only this command has."""
    parser = command_parser(
        "fedlearn.deploy.submit",
        "Run an experiment at the nodes of a federation, and show its rounds.",
        epilog="settings: the same as in a simulation, see below",
        passes_on=command_line_parser(),
        add_help=False,
    )
    add_connection_options(parser)
    parser.add_argument(
        "--resume", metavar="FOLDER", help="resume a stopped run, also with other settings, e.g. rounds=100"
    )
    parser.add_argument("--follow", type=int, metavar="ID", help="follow a run that was submitted earlier")
    parser.add_argument("--reconnect-timeout", type=float, default=120.0, help="seconds to wait for a lost coordinator")
    add_config_option(parser, "study.yaml", has_settings=True)
    parser.add_argument("-h", "--help", action="store_true", help="show this help and the settings")
    return parser


def _submit(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    command = shlex.join(["python", "-m", "fedlearn.deploy.submit", *_connection_options(args)])
    resume_command = f"{command} --resume {{folder}}"
    follower = Follower(args.coordinator, args.keys, args.reconnect_timeout, resume_command=resume_command)
    if args.follow is not None:
        return follower.follow(args.follow)
    if args.resume is not None:
        return follower.resume_run(args.resume, overrides)
    rerun_command = f"{command} {shlex.join(overrides)}".rstrip()
    return follower.run({**compose_request(overrides), "rerun_command": rerun_command})


def _connection_options(args: argparse.Namespace) -> list[str]:
    """Return the options for the connection, without defaults."""
    address = ["--coordinator", args.coordinator] if args.coordinator != DEFAULT_COORDINATOR else []
    return address + (["--keys", str(args.keys)] if args.keys != DEFAULT_KEYS else [])


def compose_request(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the content of a run request, after the checks of a simulation.

    Args:
        overrides: overrides of a simulation.

    Returns:
        ``settings`` as names of options and values, ``folder``, and ``chosen``: True if the overrides name the folder.

    Raises:
        FedlearnError: An override is unknown, a setting is out of range, the engine is for simulations, or a setting
            names code that is no option.
    """
    job = compose_job(overrides)
    settings = config_to_dict(job.cfg, resolve_callbacks=True)
    registry = installed_registry()
    return build_request(job, registry.with_builders(user_builders(registry, settings, job.choices)))


def compose_job(overrides: Sequence[str]) -> Job:
    """Return the composed settings of a run for real nodes.

    Raises:
        FedlearnError: An override is unknown, or starts several runs.
    """
    is_chosen = any(override.startswith("engine=") for override in overrides)
    args = parse_simulation_args(overrides if is_chosen else ["engine=grid", *overrides])
    (job,) = compose(args) if not args.multirun else [None]
    if job is None or job.is_sweep:
        raise UsageError("-m starts several runs\n  expected  one run at a time\n  advice    one submission per run")
    return job


def build_request(job: Job, registry: Registry) -> dict[str, Any]:
    """Return the content of a run request, after the checks of a simulation; see `compose_request`.

    Settings become names before anything is built, so a setting that names other code runs nothing here.
    """
    named = name_settings(registry, config_to_dict(job.cfg, resolve_callbacks=True))
    resolve_settings(registry, named)
    build_plan(job.cfg)
    target = job.cfg.engine["_target_"]
    if get_object(target) is not grid:  # the coordinator has no other engine
        name = target.rpartition(".")[2]
        fix = f"the same command without engine={name}"
        raise UsageError(f"engine={name} is for simulations\n  expected  engine=grid\n  advice    {fix}")
    build_callbacks(job.cfg)
    return {"settings": named, "folder": _folder(job), "chosen": job.chosen}


def _folder(job: Job) -> str:
    """Return the run folder, relative to the folder of all runs at the coordinator."""
    parts = job.folder.parts
    return str(Path(*parts[1:])) if not job.chosen and parts[0] == OUTPUTS else str(job.folder)


if __name__ == "__main__":
    sys.exit(main())
