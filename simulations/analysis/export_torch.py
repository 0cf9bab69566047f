"""A trained network in the formats of the torch world."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from fedlearn.errors import MissingExtra
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.wrappers import TrainerWrapper
from fedlearn.trainers.torch import TorchTrainer


def save_state_dict(trainer: Trainer, params_D: np.ndarray, path: Path) -> None:
    """For ``module.load_state_dict(torch.load(path, weights_only=True))``."""
    torch.save(_network(trainer, params_D).state_dict(), path)


def save_onnx(trainer: Trainer, params_D: np.ndarray, example: np.ndarray, path: Path) -> None:
    """For any ONNX runtime: input ``x`` with any number of examples, output ``outputs`` (logits, or values).

    Args:
        trainer: of the model, in torch.
        params_D: its parameters.
        example: ``(B, ...)``, what inputs look like.
        path: of the file.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise MissingExtra("format=onnx", "export") from missing
    network = _network(trainer, params_D).cpu()
    two = torch.from_numpy(np.concatenate([example[:1], example[:1]]))  # a batch of one would be taken for a constant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own parts
        torch.onnx.export(
            network,
            (two,),
            path,
            input_names=["x"],
            output_names=["outputs"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
            dynamo=True,
        )


def _network(trainer: Trainer, params_D: np.ndarray) -> torch.nn.Module:
    """Of the trainer that is within all others."""
    while isinstance(trainer, TrainerWrapper):
        trainer = trainer.trainer
    assert isinstance(trainer, TorchTrainer)
    return trainer.network(params_D)
