"""Adapters in the files of peft: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedlearn.data.pretrained_files import find_pretrained, read_json
from fedlearn.errors import DataError, require
from fedlearn.trainers.jax.leaves import PARAMS
from fedlearn.trainers.jax.pretrained.model import TransformerModel, head_names, load_model
from fedlearn.trainers.jax.pretrained.weights import write_tensors
from fedlearn.trainers.pretrained import CAUSAL, TOKENS, PretrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # prefix of all names in a file of peft
ADVICE = "an adapter of fedlearn, or of peft with plain LoRA"
TASK_TYPES = {CAUSAL: "CAUSAL_LM", TOKENS: "TOKEN_CLS"}  # all other tasks classify texts
UNSUPPORTED = (  # settings of peft that change the model
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config"),
)


def save_adapter(model: TransformerModel, folder: str | PathLike[str], *, tuning: PretrainedModel) -> None:
    """Write the adapters and the head of a model as a folder that peft loads.

    Args:
        model: model with adapters.
        folder: folder of the files. It is created.
        tuning: settings of the fine-tuning.

    Raises:
        SettingError: the model has no adapters.
    """
    require(bool(model.adapted), "model.adapter", tuning.adapter, "lora", "model.adapter=lora")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / WEIGHTS, {_in_file(name): value for name, value in model.weights[PARAMS].items()})
    whole = [name for name in model.trained if ".lora_" not in name]
    outside = head_names(model.config, model.task, model.num_labels)  # peft saves a head as one module
    head = sorted({name.partition(".")[0] if name in outside else name.rpartition(".")[0] for name in whole})
    values = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(model.task, "SEQ_CLS"),
        "base_model_name_or_path": tuning.path,
        "r": tuning.rank,
        "lora_alpha": tuning.alpha,
        "lora_dropout": tuning.dropout,
        "target_modules": list(model.adapted),
        "modules_to_save": head or None,
        "fan_in_fan_out": model.config.kind == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }
    (path / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _in_file(name: str) -> str:
    return PREFIX + name.replace(".default.weight", ".weight")


def read_adapter(base: str, folder: str | PathLike[str]) -> TransformerModel:
    """Load a base model with an adapter of fedlearn or peft.

    Args:
        base: folder or name of the base model; see `fedlearn.data.pretrained_files.find_pretrained`.
        folder: folder of the adapter. The base model that it names is not followed.

    Raises:
        DataError: the adapter is no plain LoRA, is damaged, or belongs to another model.
    """
    path = Path(folder)
    arrays = _read(path / WEIGHTS)
    values = _read_settings(path / CONFIG)
    task = {kind: task for task, kind in TASK_TYPES.items()}.get(str(values.get("task_type")), "multiclass")
    layers = sorted(name.removeprefix(PREFIX).partition(".lora_A")[0] for name in arrays if ".lora_A" in name)
    heads = [v.shape[0] for n, v in arrays.items() if n.endswith((".classifier.weight", ".out_proj.weight"))]
    tuning = PretrainedModel(
        path=base,
        rank=values.get("r", 8),
        alpha=values.get("lora_alpha", 8),
        targets=layers,
        dropout=values.get("lora_dropout", 0.0),
    )
    if values.get("use_rslora"):
        tuning = replace(tuning, alpha=tuning.alpha * sqrt(tuning.rank))
    model = load_model(find_pretrained(base), task=task, num_labels=heads[0] if heads else 2, tuning=tuning)
    return model.built({PARAMS: _checked(arrays, model.trained, path)})


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path} is missing or damaged ({error})\n  advice    {ADVICE}") from error


def _read_settings(path: Path) -> dict[str, Any]:
    values = read_json(path)
    used = [name for name in UNSUPPORTED if values.get(name)]
    used += [] if values.get("peft_type") == "LORA" else ["peft_type"]
    used += [] if values.get("bias", "none") == "none" else ["bias"]
    if used:
        shown = f"{used[0]} {str(values.get(used[0]))[:80]}"
        raise DataError(f"{path} has {shown}\n  expected  plain LoRA\n  advice    {ADVICE}")
    return values


def _checked(arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, np.ndarray]:
    """Return the arrays by the names of the model.

    Raises:
        DataError: a name or a shape differs.
    """
    expected = {_in_file(name): tuple(shape) for name, shape in shapes.items()}
    stored = {name: tuple(value.shape) for name, value in arrays.items()}
    for name in sorted({*expected, *stored}):
        if expected.get(name) != stored.get(name):
            shown, wanted = stored.get(name, "nothing"), expected.get(name, "nothing")
            problem = f"{path} has {shown} for {name}"
            raise DataError(f"{problem}\n  expected  {wanted}, as in the base model\n  advice    {ADVICE}")
    return {name: np.asarray(arrays[_in_file(name)], np.float32) for name in shapes}
