"""Export a trained model to safetensors, a torch state dict, ONNX, or the folders of transformers and peft."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save as to_safetensors

from fedlearn.core.checkpoint import atomic_draft, write_atomically
from fedlearn.data.inputs import CharacterInputs
from fedlearn.data.subword_tokenizer import IDS, MASK, SubwordTokenizer
from fedlearn.errors import FedlearnError, MissingExtra, SettingError, did_you_mean, require
from fedlearn.runner.trained_model import TrainedModel, load_trained_model

FILE_SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt", "onnx": ".onnx"}
FOLDERS = ("adapter", "merged")  # formats of a pretrained model


def export(
    folder: Path,
    format: str = "safetensors",
    out: Path | None = None,
    *,
    checkpoint: str = "last",
    client: str | None = None,
    base: str | None = None,
) -> Path:
    """Write a model of a run, print its round to standard error, and return the path of the file.

    Args:
        folder: folder of the run.
        format: ``safetensors`` (default) writes named arrays in the orientation of torch, with metadata of the run.
            ``torch`` writes a state dict, to be loaded with ``weights_only=True``. ``onnx`` writes the whole network,
            with the preprocessing of a table. ``adapter`` writes a folder of peft with adapters and head of a
            pretrained model. ``merged`` writes the whole model as a folder of transformers. All but the first need a
            torch version of the network, also for runs in JAX.
        out: path of the file or folder; None writes ``model`` with the suffix of the format, or a folder with the name
            of the format, into the run folder.
        checkpoint: ``last`` (default), ``best`` or the number of a round.
        client: client of a personal model; None for a run with one model.
        base: folder or name of the pretrained model of the run; None takes ``model.path`` of the run.

    *Guarantees*: The file is written atomically.

    Raises:
        FedlearnError: There is no model, the format is unknown, or the network has no torch version.
        MissingExtra: The format needs a package that is not installed.
    """
    if format not in _WRITERS:
        near = did_you_mean(format, _WRITERS) or "safetensors"
        raise SettingError("format", format, f"one of {', '.join(_WRITERS)}", f"format={near}")
    path = out or folder / (format if format in FOLDERS else f"model{FILE_SUFFIXES[format]}")
    load = load_trained_model if format == "safetensors" else _load_in_torch
    model = load(folder, checkpoint=checkpoint, client=client, base=base)
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

    tokenizer = getattr(model.inputs, "tokenizer", None)
    names = ", ".join(model.description.inputs or ((IDS, MASK) if isinstance(tokenizer, SubwordTokenizer) else ()))
    expected = f"torch or safetensors, because the model has several inputs ({names})"
    require(not names, "format", "onnx", expected, "format=torch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dtype = np.int32 if isinstance(model.inputs, CharacterInputs) else np.float32
    example = np.zeros((1, *model.inputs.input_shape), dtype)
    with redirect_stdout(sys.stderr), atomic_draft(path) as draft:  # torch prints its progress
        save_onnx(model.module, example, draft)
        add_preprocessing(draft, model.preprocessing, _metadata(model))


def _pretrained(format: str, model: TrainedModel, path: Path) -> None:
    """Write a folder of transformers or peft. It appears whole, or not at all."""
    trainer = model.inner_trainer
    is_pretrained = hasattr(trainer, "pretrained")
    require(is_pretrained, "format", format, "another format: the model is not pretrained", "format=safetensors")
    from fedlearn.trainers.torch import hugging_face_files

    is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    require(is_free, "out", str(path), "a folder that does not exist, or is empty", f"out={path}_2")
    path.parent.mkdir(parents=True, exist_ok=True)
    write = hugging_face_files.save_adapter if format == "adapter" else hugging_face_files.save_merged
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}_") as draft:
        write(trainer, model.params_D, Path(draft), model.classes)
        Path(draft).chmod(0o755)
        Path(draft).replace(path)
        Path(draft).mkdir()  # the context removes it


_WRITERS: Mapping[str, Callable[[TrainedModel, Path], None]] = {
    "safetensors": _safetensors,
    "torch": _state_dict,
    "onnx": _onnx,
    **{format: partial(_pretrained, format) for format in FOLDERS},
}


def _load_in_torch(folder: Path, **options: Any) -> TrainedModel:
    model = load_trained_model(folder, framework="torch", **options)
    try:
        _ = model.trainer
    except MissingExtra:
        raise
    except SettingError as error:
        problem = f"the model of {folder} has no torch version: {error}"
        expected = "a model that exists in torch, or a format that does not need torch"
        raise FedlearnError(f"{problem}\n  expected  {expected}\n  try       format=safetensors") from error
    return model
