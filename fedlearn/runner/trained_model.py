"""Load the model of a run from one of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from fedlearn.callbacks.checkpoints import CHECKPOINT_FOLDER
from fedlearn.callbacks.formatting import format_metric
from fedlearn.callbacks.run_history import best_metrics, metric_values, read_history
from fedlearn.core import checkpoint as checkpoints
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.metrics import main_metric
from fedlearn.core.records import ServerState
from fedlearn.errors import FedlearnError, SettingError, require
from fedlearn.loop.scenario import Scenario
from fedlearn.runner.config import build_scenario
from fedlearn.runner.environment import set_environment
from fedlearn.runner.run_config import read_run_config


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """Model of a run after one of its rounds.

    Attributes:
        scenario: scenario, built from the settings of the run.
        params_D: parameters after the round, float32.
        round: number of the round.
        metric: metric that selects the best round.
        value: value of the metric after the round; None if the round was not evaluated.
    """

    scenario: Scenario
    params_D: np.ndarray
    round: int
    metric: str = ""
    value: float | None = None

    @property
    def description(self) -> str:
        """Text for commands: number of the round and value of its metric."""
        value = "not evaluated" if self.value is None else f"{self.metric} {format_metric(self.metric, self.value)}"
        return f"model of round {self.round} ({value})"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, without the batch axis."""
        return self.example.shape[1:]

    @property
    def example(self) -> np.ndarray:
        """Batch with one example of zeros, ``(1, ...)``, with the dtype of the data."""
        data = self.scenario.data
        x = next(x for x in (data.train(client).x for client in data.clients) if len(x))
        return np.zeros_like(x[:1])


def load_trained_model(folder: Path, *, checkpoint: str = "last", framework: str | None = None) -> TrainedModel:
    """Return the model of a run.

    Args:
        folder: run folder.
        checkpoint: ``last`` (default), ``best`` (see `fedlearn.callbacks.checkpoints.Checkpoints`) or the number of a
            round.
        framework: ``torch`` or ``jax``, which share the parameter vector; None keeps the framework of the run.

    Raises:
        SettingError: the checkpoint does not exist.
        FedlearnError: the folder is not a run folder, it has no complete checkpoint, or its data or framework are
            missing.
    """
    is_known = checkpoint in ("last", "best") or checkpoint.isdecimal()
    require(is_known, "checkpoint", checkpoint, "last, best or the number of a round", "checkpoint=best")
    checkpoints.check_format(folder / CHECKPOINT_FOLDER)
    cfg = read_run_config(folder)
    if framework:
        cfg.framework = framework
        if "framework" in cfg.scenario:
            cfg.scenario.framework = framework
    set_environment(cfg.get("framework"))
    scenario = build_scenario(cfg)
    statistics = ", ".join(scenario.trainer.layout.buffers[:3]) if cfg.get("buffers") == "local" else ""
    if statistics:
        reason = (
            f"the clients of {folder} kept their statistics ({statistics}, ...), without which the model is useless"
        )
        raise FedlearnError(f"{reason}\n  try       a run with buffers=average")
    metric = OmegaConf.select(cfg, "early_stop.metric") or scenario.metric or main_metric(scenario.data.task)
    state = _select(folder, checkpoint, metric, scenario.trainer.layout)
    value = dict(metric_values(read_history(folder), metric)).get(state.round)
    params_D = as_numpy(state.params_D)
    return TrainedModel(scenario=scenario, params_D=params_D, round=state.round, metric=metric, value=value)


def _select(folder: Path, name: str, metric: str, layout: Layout) -> ServerState:
    path = folder / CHECKPOINT_FOLDER
    if name == "last":
        return checkpoints.load_latest(path, layout)[0]
    saved = checkpoints.saved_rounds(path)
    round = _best_round(folder, metric, saved) if name == "best" else int(name)
    if round not in saved:
        value = f"best, which is round {round} by {metric}" if name == "best" else name
        expected = f"a saved round: {', '.join(map(str, saved)) or 'none is saved'}"
        raise SettingError("checkpoint", value, expected, "checkpoint=last")
    return checkpoints.load(checkpoints.checkpoint_path(path, round), layout)[0]


def _best_round(folder: Path, metric: str, saved: Sequence[int]) -> int:
    """Return the best round up to the newest checkpoint. The history of a killed run may have later rounds."""
    history = [line for line in read_history(folder) if saved and line["round"] <= saved[-1]]
    best = best_metrics(history).get(metric)
    if best is None:
        expected = f"a round with a finite {metric}, but the run has none"
        raise SettingError("checkpoint", "best", expected, "checkpoint=last")
    return int(best["round"])
