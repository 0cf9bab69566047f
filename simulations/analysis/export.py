"""Export a trained model to safetensors, a torch state dict, or ONNX."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from safetensors.numpy import save as to_safetensors

from fedlearn.core.checkpoint import atomic_draft, write_atomically
from fedlearn.data.inputs import CharacterInputs
from fedlearn.errors import FedlearnError, MissingExtra, SettingError, did_you_mean, require
from fedlearn.runner.trained_model import TrainedModel, load_trained_model

FILE_SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt", "onnx": ".onnx"}


def export(
    folder: Path,
    format: str = "safetensors",
    out: Path | None = None,
    *,
    checkpoint: str = "last",
    client: str | None = None,
) -> Path:
    """Write a model of a run, print its round to standard error, and return the path of the file.

    Args:
        folder: folder of the run.
        format: ``safetensors`` (default) writes named arrays in the orientation of torch, with metadata of the run.
            ``torch`` writes a state dict, to be loaded with ``weights_only=True``. ``onnx`` writes the whole network,
            with the preprocessing of a table. The last two need a torch version of the network, also for runs in JAX.
        out: path of the file; None writes ``model`` with the suffix of the format into the run folder.
        checkpoint: ``last`` (default), ``best`` or the number of a round.
        client: client of a personal model; None for a run with one model.

    *Guarantees*: The file is written atomically.

    Raises:
        FedlearnError: There is no model, the format is unknown, or the network has no torch version.
        MissingExtra: The format needs a package that is not installed.
    """
    if format not in FILE_SUFFIXES:
        near = did_you_mean(format, FILE_SUFFIXES) or "safetensors"
        raise SettingError("format", format, f"one of {', '.join(FILE_SUFFIXES)}", f"format={near}")
    path = out or folder / f"model{FILE_SUFFIXES[format]}"
    load = load_trained_model if format == "safetensors" else _load_in_torch
    model = load(folder, checkpoint=checkpoint, client=client)
    _WRITERS[format](model, path)
    sys.stderr.write(f"{model}\n")
    return path


def _safetensors(model: TrainedModel, path: Path) -> None:
    tensors = {name: array.copy() for name, array in model.layout.unpack(model.params_D).items()}
    write_atomically(path, to_safetensors(tensors, metadata=_metadata(model)))


def _metadata(model: TrainedModel) -> dict[str, str]:
    """Return the description of the run, and the preprocessing as in ``preprocessing.json``."""
    facts = {
        "scenario": model.description.scenario,
        "model": model.description.model,
        "task": model.description.task.name,
        "round": model.round,
        "client": model.parameters.client,
        "metric": model.description.metric,
        "value": None if model.value is None or not math.isfinite(model.value) else model.value,
        "layout": model.layout.digest,
    }
    preprocessing = {"preprocessing": model.preprocessing.to_json()} if model.preprocessing else {}
    return {"fedlearn": json.dumps(facts), **preprocessing}


def _state_dict(model: TrainedModel, path: Path) -> None:
    from simulations.analysis.export_torch import save_state_dict

    with atomic_draft(path) as draft:
        save_state_dict(model.module, draft)


def _onnx(model: TrainedModel, path: Path) -> None:
    from simulations.analysis.export_torch import save_onnx
    from simulations.analysis.onnx_graph import add_preprocessing

    names = ", ".join(model.description.inputs)
    expected = f"torch or safetensors, because the model has several inputs ({names})"
    require(not names, "format", "onnx", expected, "format=torch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dtype = np.int32 if isinstance(model.inputs, CharacterInputs) else np.float32
    example = np.zeros((1, *model.inputs.input_shape), dtype)
    with redirect_stdout(sys.stderr), atomic_draft(path) as draft:  # torch prints its progress
        save_onnx(model.module, example, draft)
        add_preprocessing(draft, model.preprocessing, _metadata(model))


_WRITERS: Mapping[str, Callable[[TrainedModel, Path], None]] = {
    "safetensors": _safetensors,
    "torch": _state_dict,
    "onnx": _onnx,
}


def _load_in_torch(folder: Path, *, checkpoint: str, client: str | None) -> TrainedModel:
    model = load_trained_model(folder, checkpoint=checkpoint, client=client, framework="torch")
    try:
        _ = model.trainer
    except MissingExtra:
        raise
    except SettingError as error:
        problem = f"the model of {folder} has no torch version: {error}"
        expected = "a model that exists in torch, or a format that does not need torch"
        raise FedlearnError(f"{problem}\n  expected  {expected}\n  try       format=safetensors") from error
    return model
