"""Define the run modes simulation and deployment, which differ in construction, console and commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from fedlearn.callbacks.console import Console
from fedlearn.callbacks.formatting import relative_path
from fedlearn.core.command_line import as_called
from fedlearn.runner.experiment import Experiment, build_experiment
from fedlearn.runner.parts import NO_PARTS, Parts
from fedlearn.runner.plan import Plan


@dataclass(frozen=True, kw_only=True)
class RunMode:
    """Differences between a simulation and a deployment. Their rounds are the same.

    Args:
        build_experiment: function from settings, plan and run folder to the experiment.
        rerun_command: function from run folder to the command that repeats the run.
        resume_command: function from run folder to the command that resumes the run.
        create_console: function that returns the console of the run; None, the default, keeps the default console.
        check_settings: function that refuses settings of a submitter that the operator does not allow; the default
            accepts all settings.
        files: names of further files that the mode writes into a run folder.
        parts: objects of a Python program that replace groups of settings; default none.
    """

    build_experiment: Callable[[DictConfig, Plan | None, Path], Experiment]
    rerun_command: Callable[[Path], str]
    resume_command: Callable[[Path], str]
    create_console: Callable[[], Console] | None = None
    check_settings: Callable[[DictConfig], None] = lambda cfg: None
    files: tuple[str, ...] = ()
    parts: Parts = NO_PARTS


SIMULATION = RunMode(
    build_experiment=lambda cfg, plan, folder: build_experiment(cfg, plan),
    rerun_command=lambda folder: (
        f"python -m simulations.run --config-path {shlex.quote(relative_path(folder))} --config-name config"
    ),
    resume_command=lambda folder: as_called(f"python -m simulations.resume {shlex.quote(str(folder))}"),
)


def simulation_with(parts: Parts) -> RunMode:
    """Return the mode of a simulation with objects of a Python program."""
    return replace(
        SIMULATION, parts=parts, build_experiment=lambda cfg, plan, folder: build_experiment(cfg, plan, parts=parts)
    )
