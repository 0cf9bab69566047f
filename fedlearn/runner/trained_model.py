"""The model that a run has trained, taken from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlearn.core import checkpoint
from fedlearn.core.arrays import as_numpy
from fedlearn.errors import FedlearnError
from fedlearn.loop.scenario import Scenario
from fedlearn.runner.config import build_scenario
from fedlearn.runner.environment import set_environment
from fedlearn.runner.rounds import CHECKPOINT_FOLDER
from fedlearn.runner.run_config import read_run_config


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A run's last model.

    Attributes:
        scenario: rebuilt from the run's settings.
        params_D: after the last round that was saved.
        round: that round.
    """

    scenario: Scenario
    params_D: np.ndarray
    round: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.example.shape[1:]

    @property
    def example(self) -> np.ndarray:
        """``(1, ...)``: what an example looks like, without being anybody's."""
        data = self.scenario.data
        x = next(x for x in (data.train(client).x for client in data.clients) if len(x))
        return np.zeros_like(x[:1])


def load_trained_model(folder: Path, *, framework: str | None = None) -> TrainedModel:
    """The model of a run.

    Args:
        folder: of the run.
        framework: instead of the run's: the flat vector of one is that of the other.

    Raises:
        FedlearnError: the folder holds no run, no whole checkpoint, or its data or framework are not here.
    """
    checkpoint.check_format(folder / CHECKPOINT_FOLDER)
    cfg = read_run_config(folder)
    if framework:
        cfg.framework = framework
        if "framework" in cfg.scenario:
            cfg.scenario.framework = framework
    set_environment(cfg.get("framework"))
    scenario = build_scenario(cfg)
    own = ", ".join(scenario.trainer.layout.buffers[:3]) if cfg.get("buffers") == "local" else ""
    if own:
        why = f"the clients of {folder} kept their statistics ({own}, ...): the model without them predicts nothing"
        raise FedlearnError(f"{why}\n  try       a run with buffers=average")
    state, _, _ = checkpoint.load_latest(folder / CHECKPOINT_FOLDER, scenario.trainer.layout)
    return TrainedModel(scenario=scenario, params_D=as_numpy(state.params_D), round=state.round)
