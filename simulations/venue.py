"""Where a run takes place: what builds it, who shows it, and which commands repeat it and go on with it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from fedlearn.config import Experiment, Plan, experiment
from fedlearn.sinks.console import Console
from fedlearn.sinks.wording import near


@dataclass(frozen=True, kw_only=True)
class Venue:
    """What differs between a simulation and a deployment; the rounds themselves do not.

    Args:
        build: from settings, what was planned and the run's folder to all that the run needs.
        console: who shows the run.
        again: the command that repeats a run, from its folder.
        resume: the command that goes on with a run, from its folder.
    """

    build: Callable[[DictConfig, Plan | None, Path], Experiment]
    console: Callable[[], Console]
    again: Callable[[Path], str]
    resume: Callable[[Path], str]


HERE = Venue(
    build=lambda cfg, planned, folder: experiment(cfg, planned),
    console=Console,
    again=lambda folder: f"python -m simulations.run --config-path {shlex.quote(near(folder))} --config-name config",
    resume=lambda folder: f"python -m simulations.resume {shlex.quote(str(folder))}",
)
