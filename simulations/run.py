"""``python -m simulations.run``: one experiment, or a sweep of them, from settings to a folder of results."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig
from platformdirs import user_cache_path

from fedlearn import start
from fedlearn.config import Plan, plan
from fedlearn.errors import FedlearnError
from fedlearn.history import METRICS_FILE
from fedlearn.hydra_compat import command_line_parser, run_command_line, run_folder
from fedlearn.targets import BuildError
from simulations.describe import describe
from simulations.exits import BAD_CONFIGURATION, DONE, FAILED, STOPPED, exit_code
from simulations.folder import LOG, at_work, claim, unused
from simulations.interrupt import terminate_as_interrupt
from simulations.overrides import CONF, Job, UsageError, compose
from simulations.recipe import write_recipe
from simulations.rounds import Outcome, conduct
from simulations.venue import HERE, Venue

log = logging.getLogger(__name__)


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code is 0 done, 2 bad configuration, 3 failed, 130 stopped."""
    args = arguments(words)
    if args.help or args.hydra_help or args.shell_completion:
        return _hydra(args, lambda cfg: None)
    terminate_as_interrupt()
    return exit_code(lambda: _asked_for(args))


def arguments(words: Sequence[str] | None) -> Namespace:
    """Hydra's own options, with paths as seen from here; all other words are overrides."""
    args, unknown = command_line_parser().parse_known_args(words)
    args.overrides += unknown  # refused later, in our words
    for option in ("config_path", "config_dir"):
        if getattr(args, option):
            setattr(args, option, os.path.abspath(getattr(args, option)))
    return args


def run(job: Job, planned: Plan | None = None, *, venue: Venue = HERE) -> Outcome:
    """One experiment, from its settings to its folder.

    Raises:
        FedlearnError: a setting is bad, data are missing, the folder cannot be used; no folder is left behind, save
            where code that the settings name failed: then its run.log has the traceback.
    """
    set_environment(job.cfg)
    claimed = claim(job.folder, chosen=job.chosen)
    try:
        with at_work(claimed.path):
            return _in_folder(job.cfg, claimed.path, planned, venue)
    except BuildError:
        sys.stderr.write(f"see {claimed.path / LOG}\n")
        raise
    except (FedlearnError, KeyboardInterrupt) as error:
        if not (claimed.path / METRICS_FILE).exists():
            claimed.give_up()
        elif isinstance(error, KeyboardInterrupt):
            sys.stderr.write(f"{venue.resume(claimed.path)} goes on\n")
        raise


def _in_folder(cfg: DictConfig, folder: Path, planned: Plan | None, venue: Venue) -> Outcome:
    write_recipe(folder, cfg)
    try:
        made = venue.build(cfg, planned, folder)
    except BuildError:
        log.exception("the experiment cannot be built")
        raise
    for name, text in made.scenario.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    params_D = made.scenario.trainer.init(made.plan.seed)
    state = start(made.plan.strategy, params_D, made.engine, seed=made.plan.seed)
    info = describe(made, cfg, folder, again=venue.again(folder))
    return conduct(made, info, state, report=bool(cfg.get("report", True)), venue=venue)


def set_environment(cfg: DictConfig) -> None:
    """What must be said before a framework is loaded; whatever the user has set stays."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    if cfg.get("framework") in ("jax", "mixed"):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory of a GPU to others
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(user_cache_path("fedlearn") / "jax"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _asked_for(args: Namespace) -> int:
    jobs = compose(args)
    if args.cfg or args.info:
        return _hydra(args, lambda cfg: None)
    plans = [_planned(job.cfg) for job in jobs]
    return _sweep(args, jobs[0]) if jobs[0].swept else run(jobs[0], plans[0]).exit_code


def _planned(cfg: DictConfig) -> Plan | None:
    """The plan, or None where the user's own code fails: that is told once there is a log for its traceback."""
    try:
        return plan(cfg)
    except BuildError:
        return None


def _sweep(args: Namespace, first: Job) -> int:
    """Run one job after another; one that fails does not stop the others, Ctrl-C does."""
    codes = [DONE]

    def job(cfg: DictConfig) -> float:
        folder = run_folder()
        outcome = Outcome(exit_code=FAILED)

        def body() -> int:
            nonlocal outcome
            outcome = run(Job(cfg=cfg, folder=folder, chosen=True))
            return outcome.exit_code

        codes.append(exit_code(body))
        if codes[-1] == STOPPED:
            raise KeyboardInterrupt
        with suppress(OSError):  # Hydra made the folder, whether there was anything to run or not
            folder.rmdir()
        return outcome.score

    folder = unused(first.sweep_folder, chosen=first.chosen)
    args.overrides.append(f"hydra.sweep.dir={_quoted(str(folder))}")
    return max(_hydra(args, job), *codes)


def _quoted(text: str) -> str:
    """A value that Hydra's grammar takes as it is."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _hydra(args: Namespace, job: Callable[[DictConfig], float | None]) -> int:
    """Hydra's own command line, for all that is not a single run."""
    sys.stdout.flush()
    try:
        run_command_line(args, job, folder=CONF)
    except ValueError as error:  # flags that do not go together
        raise UsageError(str(error)) from error
    except SystemExit as error:
        return BAD_CONFIGURATION if error.code else DONE
    return DONE


if __name__ == "__main__":
    sys.exit(main())
