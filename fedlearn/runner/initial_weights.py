"""Get the initial parameters from the trainer, another run (``init=RUN_FOLDER``) or a file (``init=FILE``).

Shapes: D parameters of the flat vector.
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
from fedlearn.runner.experiment import Experiment
from fedlearn.runner.run_folder import CONFIG_FILE

EXPECTED = "a run folder, or a .safetensors file in the format of python -m simulations.export"


def require_source(init: str | None) -> None:
    """Refuse a path that is neither a run folder nor a ``.safetensors`` file. Call this before data are loaded.

    Raises:
        SettingError: the path does not exist, or is another file or folder.
    """
    if init is None:
        return
    path = Path(init)
    is_source = (path / CONFIG_FILE).is_file() if path.is_dir() else path.is_file() and path.suffix == ".safetensors"
    if not is_source:
        fix = "init=null"
        raise SettingError("init", init, EXPECTED, fix)


def first_state(experiment: Experiment, cfg: DictConfig) -> ServerState:
    """Return the server state before the first round. The engine is closed if an error occurs.

    Raises:
        SettingError: the source in ``init`` has another model.
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
        trainer: source of the parameters if ``init`` is None; source of the layout otherwise.
        seed: seed of the run.
        init: run folder, for the parameters of its newest checkpoint, or a ``.safetensors`` file; None for the
            parameters of the trainer.

    Raises:
        SettingError: the file or run has another model, or the run has no usable checkpoint. The error names the first
            difference.
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
        expected = "a run with a complete checkpoint of the same scenario and model"
        raise SettingError("init", str(folder), expected, "init=null") from error
    return as_numpy(state.params_D)


def _from_file(path: Path, layout: Layout) -> np.ndarray:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise SettingError("init", str(path), f"{EXPECTED} ({error})", "init=null") from error
    shapes = {leaf.name: leaf.shape for leaf in layout.leaves}
    in_file = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in [*shapes, *in_file]:
        if shapes.get(name) != in_file.get(name):
            shape, expected = in_file.get(name, "nothing"), shapes.get(name, "nothing")
            fix = "init=null"
            raise SettingError(
                "init", f"{path} with {shape} for {name}", f"{expected}, as in the model of the run", fix
            )
    return layout.pack({name: np.asarray(tensors[name], np.float32) for name in shapes})
