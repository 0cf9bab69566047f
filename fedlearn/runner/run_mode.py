"""The differences between a simulation and a deployment: building, console, and commands to repeat and resume."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from fedlearn.callbacks.console import Console
from fedlearn.callbacks.formatting import relative_path
from fedlearn.core.command_line import as_called
from fedlearn.runner.config import Experiment, Plan, build_experiment


@dataclass(frozen=True, kw_only=True)
class RunMode:
    """The differences between a simulation and a deployment; the rounds are the same.

    Args:
        build_experiment: builds the experiment from settings, plan and run folder.
        rerun_command: returns the command that repeats a run, from its folder.
        resume_command: returns the command that resumes a run, from its folder.
        create_console: creates the console that replaces the default console; None keeps the default.
        check_settings: refuses settings of a submitter that the operator does not allow; accepts all by default.
    """

    build_experiment: Callable[[DictConfig, Plan | None, Path], Experiment]
    rerun_command: Callable[[Path], str]
    resume_command: Callable[[Path], str]
    create_console: Callable[[], Console] | None = None
    check_settings: Callable[[DictConfig], None] = lambda cfg: None


SIMULATION = RunMode(
    build_experiment=lambda cfg, planned, folder: build_experiment(cfg, planned),
    rerun_command=lambda folder: (
        f"python -m simulations.run --config-path {shlex.quote(relative_path(folder))} --config-name config"
    ),
    resume_command=lambda folder: as_called(f"python -m simulations.resume {shlex.quote(str(folder))}"),
)
