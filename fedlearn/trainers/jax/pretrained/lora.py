"""Names of the trained parameters: adapters of peft inside a model of transformers, the head, or all parameters.

Reference: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022, arXiv:2106.09685.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from fedlearn.core.adapters import LORA_A, LORA_B, LORA_MERGED
from fedlearn.errors import require
from fedlearn.trainers.pretrained import PretrainedModel

DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = {  # as in peft
    **dict.fromkeys(("bert", "roberta"), ("query", "value")),
    "gpt2": ("c_attn",),
    **dict.fromkeys(("llama", "mistral", "qwen2"), ("q_proj", "v_proj")),
}
LAYER = re.compile(r"\.(?:layer|layers|h)\.(\d+)\.")  # number of the layer in the name of a parameter


def adapter_shapes(layer: str, outputs: int, inputs: int, tuning: PretrainedModel) -> dict[str, tuple[int, int]]:
    """Return the shapes of the matrices of an adapted layer, by name."""
    merged = {f"{layer}{LORA_MERGED}": (outputs, inputs)} if tuning.mergeable else {}
    return {f"{layer}{LORA_A}": (tuning.rank, inputs), f"{layer}{LORA_B}": (outputs, tuning.rank), **merged}


def adapted_layers(model: PretrainedModel, layers: Sequence[str], *, kind: str, depth: int) -> tuple[str, ...]:
    """Return the names of the affine layers that get adapters.

    Args:
        model: settings of the fine-tuning.
        layers: names of all affine layers of the model, without its head.
        kind: type of the model.
        depth: number of layers of the model.

    Raises:
        SettingError: a target is no end of the name of an affine layer.
    """
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    expected = f"names of affine maps of the model, such as {', '.join(known)}, or all-linear"
    targets = DEFAULT_TARGETS.get(kind, ()) if model.targets is None else model.targets
    require(bool(targets), "model.targets", model.targets, expected, "model.targets=all-linear")
    if targets == "all-linear":
        targets = tuple(layers)
    chosen = [layer for layer in layers if any(_ends_with(layer, target) for target in targets)]
    require(bool(chosen), "model.targets", model.targets, expected, "model.targets=all-linear")
    tuned = tuned_depth(model, depth)
    return tuple(layer for layer in chosen if model.layers is None or _is_last(layer, depth=depth, tuned=tuned))


def tuned_depth(model: PretrainedModel, depth: int) -> int:
    """Return the number of tuned layers."""
    if model.layers is None:
        return depth
    expected = f"at most {depth}, the number of layers of the model"
    require(model.layers <= depth, "model.layers", model.layers, expected, f"model.layers={depth}")
    return model.layers


def trained_whole(
    model: PretrainedModel, names: Collection[str], *, head: Collection[str], depth: int
) -> tuple[str, ...]:
    """Return the names of the parameters of the base model that are trained themselves.

    Args:
        model: settings of the fine-tuning.
        names: names of all parameters.
        head: names of the parameters of the head.
        depth: number of layers of the model.
    """
    if model.adapter != "full":
        return tuple(head)
    tuned = tuned_depth(model, depth)
    if model.layers is None:
        return tuple(names)
    return tuple(name for name in names if name in head or _is_last(name, depth=depth, tuned=tuned))


def _is_last(name: str, *, depth: int, tuned: int) -> bool:
    """Return whether a parameter or layer belongs to the last layers of the model."""
    found = LAYER.search(name)
    return found is not None and int(found[1]) >= depth - tuned


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
