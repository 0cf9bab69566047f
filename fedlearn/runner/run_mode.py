"""Where a run takes place: what builds it, who shows it, and which commands repeat it and go on with it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from fedlearn.callbacks.console import Console
from fedlearn.callbacks.formatting import relative_path
from fedlearn.runner.config import Experiment, Plan, build_experiment


@dataclass(frozen=True, kw_only=True)
class RunMode:
    """What differs between a simulation and a deployment; the rounds themselves do not.

    Args:
        build_experiment: from settings, what was planned and the run's folder to all that the run needs.
        create_console: who shows the run.
        rerun_command: the command that repeats a run, from its folder.
        resume_command: the command that goes on with a run, from its folder.
    """

    build_experiment: Callable[[DictConfig, Plan | None, Path], Experiment]
    create_console: Callable[[], Console]
    rerun_command: Callable[[Path], str]
    resume_command: Callable[[Path], str]


SIMULATION = RunMode(
    build_experiment=lambda cfg, planned, folder: build_experiment(cfg, planned),
    create_console=Console,
    rerun_command=lambda folder: (
        f"python -m simulations.run --config-path {shlex.quote(relative_path(folder))} --config-name config"
    ),
    resume_command=lambda folder: f"python -m simulations.resume {shlex.quote(str(folder))}",
)
