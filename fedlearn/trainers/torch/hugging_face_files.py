"""Write a fine-tuned model in the forms of transformers and peft: a folder with an adapter, or a merged model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from fedlearn.data.subword_tokenizer import auto_tokenizer
from fedlearn.errors import MissingExtra, require
from fedlearn.trainers.pretrained import CAUSAL, TOKENS
from fedlearn.trainers.torch.hugging_face import HuggingFaceTrainer, lora_config, modules_of, quiet

PREFIX = "base_model.model."  # prefix of names in the files of peft
TASK_TYPES = {CAUSAL: "CAUSAL_LM", TOKENS: "TOKEN_CLS"}  # others are SEQ_CLS


def save_adapter(trainer: HuggingFaceTrainer, params_D: Any, folder: Path, classes: Sequence[str] = ()) -> None:
    """Write adapters and head as a folder that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        trainer: trainer of the model.
        params_D: parameters.
        folder: empty folder.
        classes: names of the classes; the adapter of peft has no place for them.

    Raises:
        SettingError: the model has no adapters.
    """
    model = trainer.pretrained
    expected = "merged, because the model has no adapters"
    require(model.adapter == "lora", "format", "adapter", expected, "format=merged")
    expected = "merged, because the server has merged adapters of higher rank into the model"
    require(not model.mergeable, "format", "adapter", expected, "format=merged")
    from peft import LoraConfig

    config = LoraConfig(
        **lora_config(trainer.module, model, trainer.head),
        task_type=TASK_TYPES.get(trainer.task.name, "SEQ_CLS"),
        modules_to_save=_saved_modules(trainer) or None,
        base_model_name_or_path=model.path,
        revision=model.revision,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {
        name: parameter for name, parameter in trainer.network(params_D).named_parameters() if name in trainer.trained
    }
    named = {PREFIX + name.replace(".default.", "."): p.detach().cpu().contiguous() for name, p in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    auto_tokenizer(trainer.files.folder).save_pretrained(folder)


def _saved_modules(trainer: HuggingFaceTrainer) -> list[str]:
    """Return the names of the modules that are trained whole. peft saves a head of several layers as one module."""
    base = f"{trainer.module.base_model_prefix}."
    inner = [name for name in trainer.head if name.startswith(base)]
    return sorted({*modules_of(inner), *(name.partition(".")[0] for name in trainer.head if name not in inner)})


def save_merged(trainer: HuggingFaceTrainer, params_D: Any, folder: Path, classes: Sequence[str] = ()) -> None:
    """Write the whole model, with adapters added to the weights, as a folder that ``from_pretrained`` loads.

    Args:
        trainer: trainer of the model.
        params_D: parameters.
        folder: empty folder.
        classes: names of the classes in the order of their numbers.
    """
    module: Any = merge(trainer.network(params_D))
    if classes:
        module.config.id2label = dict(enumerate(classes))
        module.config.label2id = {name: number for number, name in enumerate(classes)}
    if trainer.pretrained.gradient_checkpointing:
        module.activation_checkpointing_disable()
    with quiet():
        module.save_pretrained(folder, safe_serialization=True)
    auto_tokenizer(trainer.files.folder).save_pretrained(folder)


def merge(module: nn.Module) -> nn.Module:
    """Return a module whose adapters are added to the weights of their maps. The module itself changes."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise MissingExtra("format=merged", "hf") from error
    for name, part in list(module.named_modules()):
        if isinstance(part, LoraLayer):
            part.merge()
            _add_merged_matrix(part)
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, part.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config
    if getattr(module, "_hf_peft_config_loaded", False):
        setattr(module, "_hf_peft_config_loaded", False)  # noqa: B010 - a field of transformers that types do not know
    return module


def _add_merged_matrix(layer: Any) -> None:
    """Add the matrix M of a mergeable adapter to the weight of its map."""
    if not hasattr(layer, "lora_merged"):
        return
    weight, change = layer.get_base_layer().weight, layer.scaling["default"] * layer.lora_merged.weight
    weight.data += change.data.T if layer.fan_in_fan_out else change.data
