"""A pretrained text encoder that is tuned to a task, whole or by adapters: twins in either framework.

Shapes: D parameters laid flat, E width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout, default_initial_parameters
from fedlearn.errors import did_you_mean, is_count, is_number, require
from fedlearn.loop.protocols import Trainer
from fedlearn.trainers.mixed import MixedTrainer
from simulations.models import load_family

TUNING_KINDS = ("lora", "full")
PROJECTIONS = ("query", "key", "value", "mix", "up", "down")  # the affine maps of a layer
MASK_PENALTY = 1e9  # what a hidden position loses before a softmax


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Of an encoder.

    Args:
        vocab_size: token numbers run from 0, which pads, to this - 1.
        length: of a text, with its padding.
        width: E, of what stands for a token.
        num_heads: of attention.
        num_layers: layers.
        hidden: width inside of a layer's perceptron.
        epsilon: of layer norm.
    """

    vocab_size: int
    length: int
    width: int
    num_heads: int
    num_layers: int
    hidden: int
    epsilon: float

    @property
    def projections(self) -> Mapping[str, tuple[int, int]]:
        """Inputs and outputs of each of ``PROJECTIONS``."""
        square, up = (self.width, self.width), (self.width, self.hidden)
        return dict(zip(PROJECTIONS, (square, square, square, square, up, up[::-1]), strict=True))


@dataclass(frozen=True, kw_only=True)
class PretrainedEncoder:
    """An encoder as it was trained elsewhere.

    Args:
        name: for the header.
        config: its.
        weights: each parameter by the name that it has in `simulations.models.encoder.torch`, without the head's.
    """

    name: str
    config: EncoderConfig
    weights: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """What of a pretrained encoder is trained and travels, beside the head; all else stays, and is nobody's update.

    A map ``W x + b`` with an adapter becomes ``W x + b + alpha / r B A x`` with W and b as they were. A begins as any
    layer of r outputs, B at zero, so that tuning begins at the encoder as it is.

    Args:
        kind: ``lora`` (A and B) or ``full`` (the layers themselves, and the embeddings if it is all of them).
        num_tuned_layers: how many, from the top, are tuned, >= 0; 0 is the head alone.
        rank: r, >= 1, of ``lora``.
        alpha: > 0, of ``lora``.
        projections: of ``lora``: which of ``PROJECTIONS`` have adapters, one at least.
        dropout: share of what adapters and head read that is set to zero in training, in [0, 1).

    Raises:
        SettingError: a setting is out of range, by the name that it has in a scenario.

    Reference: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022, arXiv:2106.09685, section 4.

    >>> [FineTuning(num_tuned_layers=1).adapted_modules(layer, num_layers=6) for layer in (4, 5)]
    [(), ('query', 'value')]
    """

    kind: str = "lora"
    num_tuned_layers: int = 3
    rank: int = 8
    alpha: float = 16.0
    projections: Sequence[str] = ("query", "value")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        guess = did_you_mean(str(self.kind), TUNING_KINDS) or "lora"
        require(self.kind in TUNING_KINDS, "tuning", self.kind, f"one of {', '.join(TUNING_KINDS)}", f"tuning={guess}")
        layers = is_count(self.num_tuned_layers, at_least=0)
        require(layers, "layers", self.num_tuned_layers, "a whole number >= 0 of layers, from the top", "layers=3")
        require(is_count(self.rank), "lora_rank", self.rank, "a whole number >= 1", "lora_rank=8")
        positive = is_number(self.alpha, at_least=0) and self.alpha > 0
        require(positive, "lora_alpha", self.alpha, "a number > 0", "lora_alpha=16")
        chosen = self.projections if isinstance(self.projections, Sequence) else ()
        known = 0 < len(set(chosen) & set(PROJECTIONS)) == len(chosen)
        expected = f"a list of some of {', '.join(PROJECTIONS)}"
        require(known, "lora_on", self.projections, expected, "lora_on=[query,value]")
        share = is_number(self.dropout, at_least=0, below=1)
        require(share, "dropout", self.dropout, "a number in [0, 1)", "dropout=0.1")

    @property
    def scale(self) -> float:
        """Of what an adapter adds."""
        return self.alpha / self.rank

    def adapted_modules(self, layer: int, *, num_layers: int) -> tuple[str, ...]:
        """The maps of a layer that have adapters."""
        return tuple(self.projections) if self.kind == "lora" and layer >= num_layers - self.num_tuned_layers else ()

    def frozen_params(self, encoder: PretrainedEncoder) -> Mapping[str, np.ndarray]:
        """The parameters that stay as they are."""
        if self.kind == "lora":
            return encoder.weights
        depth = encoder.config.num_layers
        tuned = tuple(f"layer_{layer}." for layer in range(depth) if layer >= depth - self.num_tuned_layers)
        everything = self.num_tuned_layers >= depth
        return {name: v for name, v in encoder.weights.items() if not (everything or name.startswith(tuned))}


def build_fine_tuning_trainer(
    encoder: PretrainedEncoder,
    tuning: FineTuning,
    data: FederatedData,
    *,
    framework: str = "torch",
    device: str = "cpu",
) -> tuple[Trainer, str]:
    """A trainer of a pretrained encoder with a head for a task, and one line that describes it.

    Args:
        encoder: to begin from.
        tuning: what of it is trained.
        data: for the task and the number of classes; examples are ``(length,)`` token numbers.
        framework: ``torch``, ``jax`` or ``mixed``.
        device: where to compute.

    Raises:
        SettingError: more layers are to be tuned than there are, or the framework is unknown.
        MissingExtra: the framework is not installed.
    """
    depth = encoder.config.num_layers
    require(
        tuning.num_tuned_layers <= depth,
        "layers",
        tuning.num_tuned_layers,
        f"at most {depth}, which {encoder.name} has",
        "layers=3",
    )
    how = f"lora {tuning.rank} on {', '.join(tuning.projections)}" if tuning.kind == "lora" else tuning.kind
    line = (
        f"{encoder.name}, {how}, {tuning.num_tuned_layers} of {depth} layers"
        if tuning.num_tuned_layers
        else f"{encoder.name}, head"
    )
    if framework == "mixed":
        trainers = [_trainer(encoder, tuning, data, one, device) for one in ("torch", "jax")]
        return MixedTrainer(trainers), line
    return _trainer(encoder, tuning, data, framework, device), line


def _trainer(
    encoder: PretrainedEncoder, tuning: FineTuning, data: FederatedData, framework: str, device: str
) -> Trainer:
    modules, trainers = load_family(framework, "encoder")
    num_outputs = data.num_classes if data.task == "multiclass" else 1
    frozen = tuning.frozen_params(encoder)
    how: dict[str, Any] = {"task": data.task, "device": device, "initial": partial(_initial, encoder.weights)}
    module = modules.build_encoder(encoder.config, tuning, num_outputs, frozen)
    if framework == "torch":
        made: Trainer = trainers.TorchTrainer(module, **how)
        return made
    made = trainers.JaxTrainer(module, input_shape=(encoder.config.length,), **how)
    return made


def _initial(weights: Mapping[str, np.ndarray], layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """What is known, adapters that add nothing, and all else by the default law."""
    tensors = layout.unpack(default_initial_parameters(layout, rng))
    for name, tensor in tensors.items():
        if name in weights:
            tensor[...] = weights[name]
        elif name.endswith("_b.weight"):
            tensor[...] = 0
    return layout.pack(tensors)
