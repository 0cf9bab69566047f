"""Fine-tune a pretrained text encoder, by its own layers or by adapters, in both frameworks.

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
MASK_PENALTY = 1e9  # subtracted from the scores of masked positions before a softmax


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of a pretrained encoder.

    Args:
        vocab_size: number of tokens; token numbers are below it, and 0 is padding.
        length: number of tokens of a text, including padding.
        width: width E of a token vector.
        num_heads: number of attention heads.
        num_layers: number of layers.
        hidden: hidden width of the perceptron of a layer.
        epsilon: constant in the denominator of layer norm.
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
    """A pretrained encoder: its name, sizes and weights.

    Args:
        name: name in the header of a run.
        config: sizes of the encoder.
        weights: parameters without the head, by their names in `simulations.models.encoder.torch`.
    """

    name: str
    config: EncoderConfig
    weights: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Settings of the fine-tuning of a pretrained encoder.

    They choose the parameters that are trained and sent, beside the head. All other parameters are frozen and not part
    of an update.

    An adapter changes a map ``W x + b`` to ``W x + b + alpha / r B A x`` with frozen W and b. A has the default initial
    values of an affine map. B starts at zero, so that the initial model equals the pretrained encoder.

    Args:
        kind: ``lora`` (default) trains A and B. ``full`` trains the layers themselves, and also the embeddings if all
            layers are tuned.
        num_tuned_layers: number of tuned layers, counted from the last one, >= 0, default 3; 0 trains the head only.
        rank: rank r of ``lora``, >= 1, default 8.
        alpha: factor alpha of ``lora``, > 0, default 16.
        projections: affine maps that have adapters with ``lora``, at least one of ``PROJECTIONS``.
        dropout: share of the inputs of adapters and head that training sets to zero, in [0, 1), default 0.

    Raises:
        SettingError: A setting is out of range. The error has the name of the setting in a scenario.

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
        require(layers, "layers", self.num_tuned_layers, "a whole number >= 0, counted from the last layer", "layers=3")
        require(is_count(self.rank), "lora_rank", self.rank, "a whole number >= 1", "lora_rank=8")
        positive = is_number(self.alpha, at_least=0) and self.alpha > 0
        require(positive, "lora_alpha", self.alpha, "a number > 0", "lora_alpha=16")
        chosen = self.projections if isinstance(self.projections, Sequence) else ()
        known = 0 < len(set(chosen) & set(PROJECTIONS)) == len(chosen)
        expected = f"a list of some of {', '.join(PROJECTIONS)}"
        require(known, "lora_on", self.projections, expected, "'lora_on=[query,value]'")
        share = is_number(self.dropout, at_least=0, below=1)
        require(share, "dropout", self.dropout, "a number in [0, 1)", "dropout=0.1")

    @property
    def scale(self) -> float:
        """Factor of the output of an adapter, alpha / r."""
        return self.alpha / self.rank

    def adapted_modules(self, layer: int, *, num_layers: int) -> tuple[str, ...]:
        """Return the names of the affine maps of a layer that have adapters."""
        return tuple(self.projections) if self.kind == "lora" and layer >= num_layers - self.num_tuned_layers else ()

    def frozen_params(self, encoder: PretrainedEncoder) -> Mapping[str, np.ndarray]:
        """Return the parameters of the encoder that training does not change."""
        if self.kind == "lora":
            return encoder.weights
        depth = encoder.config.num_layers
        tuned = tuple(f"layer_{layer}." for layer in range(depth) if layer >= depth - self.num_tuned_layers)
        all_tuned = self.num_tuned_layers >= depth
        return {name: v for name, v in encoder.weights.items() if not (all_tuned or name.startswith(tuned))}


def build_fine_tuning_trainer(
    encoder: PretrainedEncoder,
    tuning: FineTuning,
    data: FederatedData,
    *,
    framework: str = "torch",
    device: str = "cpu",
) -> tuple[Trainer, str]:
    """Build a trainer for a pretrained encoder with a head for the task, and describe the model in one line.

    Args:
        encoder: pretrained encoder with the initial weights.
        tuning: settings of the fine-tuning.
        data: data set that defines the task and the number of classes; an example has shape (length,), token numbers.
        framework: ``torch`` (default), ``jax`` or ``mixed``.
        device: device for the computation.

    Raises:
        SettingError: ``tuning`` has more layers than the encoder, or the framework is unknown.
        MissingExtra: The framework is not installed.
    """
    depth = encoder.config.num_layers
    require(
        tuning.num_tuned_layers <= depth,
        "layers",
        tuning.num_tuned_layers,
        f"at most {depth}, the number of layers of {encoder.name}",
        "layers=3",
    )
    kind = f"lora {tuning.rank} on {', '.join(tuning.projections)}" if tuning.kind == "lora" else tuning.kind
    line = (
        f"{encoder.name}, {kind}, {tuning.num_tuned_layers} of {depth} layers"
        if tuning.num_tuned_layers
        else f"{encoder.name}, head"
    )
    if framework == "mixed":
        trainers = [_build_trainer(encoder, tuning, data, name, device) for name in ("torch", "jax")]
        return MixedTrainer(trainers), line
    return _build_trainer(encoder, tuning, data, framework, device), line


def _build_trainer(
    encoder: PretrainedEncoder, tuning: FineTuning, data: FederatedData, framework: str, device: str
) -> Trainer:
    modules, trainers = load_family(framework, "encoder")
    num_outputs = data.task.num_outputs(data.num_classes)
    frozen = tuning.frozen_params(encoder)
    initial = partial(_initial_params, encoder.weights)
    options: dict[str, Any] = {"task": data.task, "device": device, "initial": initial}
    module = modules.build_encoder(encoder.config, tuning, num_outputs, frozen)
    if framework == "torch":
        trainer: Trainer = trainers.TorchTrainer(module, **options)
        return trainer
    trainer = trainers.JaxTrainer(module, input_shape=(encoder.config.length,), **options)
    return trainer


def _initial_params(weights: Mapping[str, np.ndarray], layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Return the initial parameters.

    Encoder parameters have their pretrained values. Matrices B of adapters are zero. All others are drawn by default.
    """
    tensors = layout.unpack(default_initial_parameters(layout, rng))
    for name, tensor in tensors.items():
        if name in weights:
            tensor[...] = weights[name]
        elif name.endswith("_b.weight"):
            tensor[...] = 0
    return layout.pack(tensors)
