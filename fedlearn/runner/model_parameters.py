"""Read the parameters of a trained model: of a round, and of a client if clients have personal models.

Shapes: D parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fedlearn.advice import label, option
from fedlearn.algorithm.strategy import with_buffer_policy
from fedlearn.callbacks.checkpoints import CHECKPOINT_FOLDER, MODEL_FOLDER, PARAMETERS_FILE
from fedlearn.callbacks.run_history import best_metrics, read_history
from fedlearn.core import checkpoint as checkpoints
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientId, ServerState, State
from fedlearn.errors import CheckpointError, FedlearnError, SettingError, require
from fedlearn.loop.local_training import personal_model
from fedlearn.runner.model_folder import ModelDescription
from fedlearn.runner.plan import build_plan
from fedlearn.runner.run_config import read_run_config

GLOBAL = "global"  # value of client for the global model, if no client has this name
MAX_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class ModelParameters:
    """Hold parameters and their round, the seed of the run, and the client of a personal model."""

    params_D: np.ndarray
    round: int
    seed: int = 0
    client: str | None = None


def read_parameters(
    folder: Path, description: ModelDescription, checkpoint: str, client: str | None
) -> ModelParameters:
    """Return the parameters of a checkpoint.

    Args:
        folder: run folder.
        description: description of the model.
        checkpoint: ``last``, ``best`` or the number of a round.
        client: name or number of the client of a personal model, or ``global``; None for a run with one model.

    Raises:
        SettingError: the checkpoint or the client does not exist, or the run needs a client.
        FedlearnError: the folder has no complete checkpoint.
    """
    is_known = checkpoint in ("last", "best") or checkpoint.isdecimal()
    require(is_known, "checkpoint", checkpoint, "last, best or the number of a round", "checkpoint=best")
    is_alone = checkpoint == "last" and not any((folder / CHECKPOINT_FOLDER).glob("round_*"))
    if is_alone and client is None and not description.is_personalised:
        return _from_model_folder(folder, description.layout)
    state, client_states = _select(folder, checkpoint, description)
    chosen = _choose_client(folder, description, client, client_states)
    if chosen is None:
        return ModelParameters(params_D=as_numpy(state.params_D), round=state.round, seed=state.seed)
    params_D = _personal_parameters(folder, description.layout, state, client_states[chosen])
    name = description.client_names[chosen]
    return ModelParameters(params_D=params_D, round=state.round, seed=state.seed, client=name)


def _from_model_folder(folder: Path, layout: Layout) -> ModelParameters:
    path = folder / MODEL_FOLDER / PARAMETERS_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            round = int((file.metadata() or {})["round"])
        return ModelParameters(params_D=layout.pack(tensors), round=round)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        fix = "the complete run folder, with its checkpoints"
        raise CheckpointError(f"{folder} has no trained model: {error}\n  advice    {fix}") from error


def _select(folder: Path, name: str, description: ModelDescription) -> tuple[ServerState, Mapping[ClientId, State]]:
    path, layout = folder / CHECKPOINT_FOLDER, description.layout
    if name == "last":
        return checkpoints.load_latest(path, layout)[:2]
    saved = checkpoints.saved_rounds(path)
    round = _best_round(folder, description.metric, saved) if name == "best" else int(name)
    if round not in saved:
        value = f"best, which is round {round} by {description.metric}" if name == "best" else name
        expected = f"a saved round: {', '.join(map(str, saved)) or 'none is saved'}"
        raise SettingError("checkpoint", value, expected, "checkpoint=last")
    return checkpoints.load(checkpoints.checkpoint_path(path, round), layout)


def _best_round(folder: Path, metric: str, saved: Sequence[int]) -> int:
    """Return the best round up to the newest checkpoint. The history of a killed run may have later rounds."""
    history = [line for line in read_history(folder) if saved and line["round"] <= saved[-1]]
    best = best_metrics(history).get(metric)
    if best is None:
        expected = f"a round with a finite {metric}, but the run has none"
        raise SettingError("checkpoint", "best", expected, "checkpoint=last")
    return int(best["round"])


def _choose_client(
    folder: Path, description: ModelDescription, client: str | None, client_states: Mapping[ClientId, State]
) -> ClientId | None:
    """Return the id of the client; None for the global model."""
    if not description.is_personalised:
        expected = "none, because all clients of this run share one model"
        require(client is None, "client", client, expected, "remove --client")
        return None
    names = description.client_names
    trained = [number for number in names if number in client_states]
    has_global = not description.personal_parameters
    matches = [number for number in trained if client is not None and client in (names[number], str(number))]
    if matches:
        return next((number for number in matches if names[number] == client), matches[0])
    if client == GLOBAL and has_global:
        return None
    if not trained:
        problem = f"the personal models of {folder} are at the clients"
        fix = f"--client {GLOBAL}" if has_global else "the machine of a client, or a strategy without personal models"
        raise FedlearnError(f"{problem}\n  expected  a run whose checkpoints have personal models\n{label(fix)}")
    shown = ", ".join(names[number] for number in trained[:MAX_SHOWN])
    more = f" and {len(trained) - MAX_SHOWN} more" if len(trained) > MAX_SHOWN else ""
    or_global = f", or {GLOBAL} for the global model" if has_global else ""
    expected = f"a client with a personal model: {shown}{more}{or_global}"
    raise SettingError("client", client, expected, option("--client", names[trained[0]]))


def _personal_parameters(folder: Path, layout: Layout, state: ServerState, client_state: State) -> np.ndarray:
    cfg = read_run_config(folder)
    strategy = with_buffer_policy(build_plan(cfg).strategy, layout, cfg.get("buffers", "refuse"))
    return as_numpy(personal_model(strategy.local, layout, state.params_D, client_state))
