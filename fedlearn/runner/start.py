"""Run one experiment or a sweep, from a command line to run folders: ``python -m simulations.run``."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from fedlearn.advice import quote_value
from fedlearn.callbacks.run_history import METRICS_FILE
from fedlearn.core.command_line import (
    BAD_CONFIGURATION,
    DONE,
    UsageError,
    exit_code,
    terminate_as_interrupt,
)
from fedlearn.errors import FedlearnError
from fedlearn.runner.builders import BuildError
from fedlearn.runner.callbacks import build_callbacks
from fedlearn.runner.compat import command_line_parser, parse_override, run_command_line
from fedlearn.runner.compose import BASIC, CONF_DIR, Job, compose_each, with_custom_targets
from fedlearn.runner.dry_run import is_dry_run, print_dry_run
from fedlearn.runner.environment import set_environment
from fedlearn.runner.evaluation.subgroups import require_subgroups
from fedlearn.runner.initial_weights import first_state, require_source
from fedlearn.runner.job_processes import JobProcesses
from fedlearn.runner.model_folder import with_declared_model, write_model_folder
from fedlearn.runner.plan import Plan, build_plan
from fedlearn.runner.rounds import RunOutcome, run_rounds
from fedlearn.runner.run_config import write_run_config
from fedlearn.runner.run_description import build_run_info
from fedlearn.runner.run_folder import LOG_FILE, locked_run_folder, reserve_run_folder, reserve_sweep_folder
from fedlearn.runner.run_mode import SIMULATION, RunMode
from fedlearn.runner.sweep import Sweep, processes_for
from fedlearn.runner.training_data import write_data_digests, write_held_out_rows

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit code: 0 done, 2 bad configuration, 3 failed, 130 stopped."""
    terminate_as_interrupt()
    return exit_code(lambda: _run_command(parse_args(argv)))


def parse_args(argv: Sequence[str] | None) -> Namespace:
    """Return the options of Hydra, with absolute paths, and the overrides.

    Raises:
        UsageError: an option does not exist, or has no value.
    """
    args: Namespace = command_line_parser().parse_args(argv)
    args.overrides = with_custom_targets(args.overrides)
    for option in ("config_path", "config_dir"):
        if getattr(args, option):
            setattr(args, option, os.path.abspath(getattr(args, option)))
    return args


def run(job: Job, planned: Plan | None = None, *, run_mode: RunMode = SIMULATION) -> RunOutcome:
    """Run one experiment in a new run folder.

    Args:
        job: configuration and folder of the run.
        planned: plan of the configuration; None builds the plan.
        run_mode: simulation (default) or deployment.

    Raises:
        FedlearnError: a setting is wrong, data are missing, or the folder cannot be used. The run folder is removed,
            unless the rounds had started.
        BuildError: code that the settings name failed. The run folder remains; ``run.log`` has the traceback.
    """
    set_environment(job.cfg.get("framework"), job.cfg.get("num_cores"), device=job.cfg.get("device") or "cpu")
    reserved = reserve_run_folder(job.folder, chosen=job.chosen)
    try:
        with locked_run_folder(reserved.path):
            outcome = _run_in_folder(job.cfg, reserved.path, planned, run_mode)
        if is_dry_run(job.cfg):
            reserved.discard(run_mode.files)
        return outcome
    except BuildError:
        sys.stderr.write(f"see {reserved.path / LOG_FILE}\n")
        raise
    except (FedlearnError, KeyboardInterrupt) as error:
        if not (reserved.path / METRICS_FILE).exists():
            reserved.discard(run_mode.files)
        elif isinstance(error, KeyboardInterrupt):
            sys.stderr.write(f"to resume: {run_mode.resume_command(reserved.path)}\n")
        raise


def _run_in_folder(cfg: DictConfig, folder: Path, planned: Plan | None, run_mode: RunMode) -> RunOutcome:
    if cfg.get("init"):
        cfg.init = os.path.abspath(cfg.init)  # a later resume may start in another folder
    require_source(cfg.get("init"))
    write_run_config(folder, cfg)
    try:
        callbacks = build_callbacks(cfg, run_mode.parts.callbacks)
        experiment = run_mode.build_experiment(cfg, planned, folder)
    except BuildError:
        log.exception("the experiment cannot be built")
        raise
    require_subgroups(experiment.scenario, experiment.plan.subgroups)
    experiment = with_declared_model(experiment, cfg)
    write_model_folder(folder, experiment, cfg)
    write_data_digests(folder, experiment.scenario)
    write_held_out_rows(folder, experiment.scenario)
    state = first_state(experiment, cfg)
    info = build_run_info(experiment, cfg, folder, run_mode=run_mode)
    if is_dry_run(cfg):
        try:
            print_dry_run(experiment, info, state)
        finally:
            experiment.engine.close()
        return RunOutcome(exit_code=DONE)
    return run_rounds(experiment, info, state, callbacks, run_mode=run_mode)


def _run_command(args: Namespace) -> int:
    if args.help or args.hydra_help or args.shell_completion:
        return _hydra(args, lambda cfg: None)
    composed = compose_each(args)
    first = next(composed)
    if args.cfg or args.info or is_dry_run(first.cfg) or not first.is_sweep:
        jobs = [first, *composed]
        if args.cfg or args.info:
            return _hydra(args, lambda cfg: None)
        plans = [_build_plan(job.cfg) for job in jobs]
        return max(run(job, plan).exit_code for job, plan in zip(jobs, plans, strict=True))
    processes = processes_for(first, args.overrides)  # these import the framework during the checks
    try:
        for job in (first, *composed):
            _build_plan(job.cfg)
        return _sweep(args, first, processes)
    finally:
        if processes is not None:
            processes.interrupt()


def _build_plan(cfg: DictConfig) -> Plan | None:
    """Return the plan. Return None if code of the user fails: its traceback belongs in the log of a run folder."""
    try:
        plan = build_plan(cfg)
        build_callbacks(cfg)
        return plan
    except BuildError:
        return None


def _sweep(args: Namespace, first: Job, processes: JobProcesses | None) -> int:
    parsed = [override for text in args.overrides for override in parse_override(text)]
    folder = reserve_sweep_folder(first.sweep_folder, chosen=first.chosen)
    args.overrides.append(f"hydra.sweep.dir={quote_value(str(folder))}")
    sweep = Sweep(
        folder=folder,
        fixed=frozenset(override.setting for override in parsed if not override.is_sweep) | {"hydra.sweep.dir"},
        run=run,
        is_parallel=processes is not None or first.choices.get("hydra/launcher", BASIC) != BASIC,
        processes=processes,
    )
    try:
        code = DONE
        if first.is_plain_sweep:
            sweep.run_all(args)
        else:
            code = _hydra(args, sweep)
        sweep.wait()
        return max(code, sweep.worst_exit_code())
    finally:
        sweep.close()


def _hydra(args: Namespace, job: Callable[[DictConfig], float | None]) -> int:
    """Run the command line of Hydra for sweeps, help and prints of the configuration. Return the exit code."""
    sys.stdout.flush()
    try:
        run_command_line(args, job, folder=CONF_DIR)
    except ValueError as error:  # two options exclude each other
        raise UsageError(str(error)) from error
    except SystemExit as error:
        return BAD_CONFIGURATION if error.code else DONE
    return DONE
