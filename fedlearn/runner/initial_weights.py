"""Initial parameters of a run: from the trainer, from another run (``init=RUN_FOLDER``) or from a file (``init=FILE``).

Shapes: D parameters laid flat.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedlearn.callbacks.checkpoints import CHECKPOINT_FOLDER
from fedlearn.core import checkpoint
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.records import ServerState
from fedlearn.errors import CheckpointError, FedlearnError, SettingError
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.training_loop import start
from fedlearn.runner.config import Experiment
from fedlearn.runner.run_folder import CONFIG_FILE

EXPECTED = "the folder of a run, or a .safetensors file as python -m simulations.export writes it"


def require_source(init: str | None) -> None:
    """Refuse a path that is neither a run folder nor a file, before data and workers are loaded.

    Raises:
        SettingError: the path does not exist, or is another kind of file or folder.
    """
    if init is None:
        return
    path = Path(init)
    found = (path / CONFIG_FILE).is_file() if path.is_dir() else path.is_file() and path.suffix == ".safetensors"
    if not found:
        raise SettingError("init", init, EXPECTED, "init=outputs/heart/fedavg/...   (what the run named as saved)")


def first_state(experiment: Experiment, cfg: DictConfig) -> ServerState:
    """Return the state before the first round. The engine is closed if there is none.

    Raises:
        SettingError: ``init`` names another model.
    """
    plan, trainer = experiment.plan, experiment.scenario.trainer
    try:
        params_D = initial_parameters(trainer, plan.seed, cfg.get("init"))
    except FedlearnError:
        experiment.engine.close()
        raise
    return start(plan.strategy, params_D, experiment.engine, seed=plan.seed)


def initial_parameters(trainer: Trainer, seed: int, init: str | None) -> np.ndarray:
    """Return the parameters before the first round.

    Args:
        trainer: gives the parameters if ``init`` is None, and the layout otherwise.
        seed: seed of the run.
        init: folder of a run, whose newest checkpoint is taken, or a ``.safetensors`` file.

    Raises:
        SettingError: the file or run holds another model; the error names the first difference.
        CheckpointError: the run has no usable checkpoint.
    """
    if init is None:
        return trainer.init(seed)
    require_source(init)
    path = Path(init)
    return _from_run(path, trainer.layout) if path.is_dir() else _from_file(path, trainer.layout)


def _from_run(folder: Path, layout: Layout) -> np.ndarray:
    try:
        state, _, _ = checkpoint.load_latest(folder / CHECKPOINT_FOLDER, layout)
    except CheckpointError as error:
        expected = "a run with a complete checkpoint of this model"
        raise SettingError("init", str(folder), expected, "init=null, or the scenario and model of that run") from error
    return as_numpy(state.params_D)


def _from_file(path: Path, layout: Layout) -> np.ndarray:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise SettingError("init", str(path), f"{EXPECTED} ({error})", "init=null") from error
    shapes = {leaf.name: leaf.shape for leaf in layout.leaves}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in [*shapes, *found]:
        if shapes.get(name) != found.get(name):
            have, want = found.get(name, "nothing"), shapes.get(name, "nothing")
            fix = "the model of that file: model=..., or init=null"
            raise SettingError("init", f"{path} with {have} for {name}", f"{want}, as the model has", fix)
    return layout.pack({name: np.asarray(tensors[name], np.float32) for name in shapes})
