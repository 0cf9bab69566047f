"""Fine-tune a pretrained model of Hugging Face: its settings, and the trainer in either framework.

`PretrainedModel` is the option ``model=hf``. `build_pretrained` builds the trainer. The network itself is in
`fedlearn.trainers.torch.hugging_face`.

The parameters that are trained are the adapters and the head. Only they are in ``params_D``: they are sent, clipped,
noised, masked, compressed and stored. All clients share one copy of the frozen base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from fedlearn.core.adapters import LORA_B, LORA_MERGED
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout, default_initial_parameters
from fedlearn.data.pretrained_files import PretrainedFiles, find_pretrained
from fedlearn.errors import MissingExtra, SettingError, did_you_mean, is_count, is_number, require
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.scenario import Network

ADAPTERS = ("lora", "full", "head")
CAUSAL, TOKENS = "causal_lm", "token_classification"  # tasks with networks of their own; others classify whole texts


@dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """Settings of a pretrained model and of its fine-tuning.

    An adapter changes a map ``W x + b`` to ``W x + b + alpha / r B A x`` with frozen W and b. A has the default initial
    values of an affine map. B starts at zero, so that the initial model equals the pretrained model.

    Args:
        path: folder of the model, or its name on the Hugging Face Hub; see
            `fedlearn.data.pretrained_files.find_pretrained`.
        revision: version on the Hub; None is the newest version.
        digest: expected SHA-256 of the files; None accepts any. A run stores the digest of the files that it used.
        adapter: ``lora`` (default) trains adapters and head, ``head`` the head only, ``full`` all parameters.
        rank: rank r of the adapters, >= 1, default 8.
        alpha: factor alpha of the adapters, > 0, default 16.
        targets: names of the affine maps with adapters, e.g. ``[query, value]``, or ``all-linear``. None takes the
            choice of the library peft for this kind of model.
        layers: number of tuned layers, counted from the last one; None tunes all. With ``full``, the embeddings are
            tuned only if all layers are.
        dropout: dropout rate at the inputs of adapters and head, in [0, 1), default 0. The base has no dropout.
        gradient_checkpointing: whether the backward pass computes activations again, which saves memory.
        mergeable: whether each adapted map also has a matrix M, ``W x + alpha / r (M + B A) x``, into which a server
            merges adapters; needed by the strategy ``flora``. M starts at zero, and clients receive it each round.

    Raises:
        SettingError: a setting is out of range.

    Reference: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022, arXiv:2106.09685, section 4.
    """

    path: str | None = None
    revision: str | None = None
    digest: str | None = None
    adapter: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] | str | None = None
    layers: int | None = None
    dropout: float = 0.0
    gradient_checkpointing: bool = False
    mergeable: bool = False

    def __post_init__(self) -> None:
        is_path = isinstance(self.path, str) and bool(self.path.strip())
        require(is_path, "model.path", self.path, "a folder, or a name on the Hugging Face Hub", "model.path=my_model")
        guess = did_you_mean(str(self.adapter), ADAPTERS) or "lora"
        fix = f"model.adapter={guess}"
        require(self.adapter in ADAPTERS, "model.adapter", self.adapter, f"one of {', '.join(ADAPTERS)}", fix)
        require(is_count(self.rank), "model.rank", self.rank, "a whole number >= 1", "model.rank=8")
        is_positive = is_number(self.alpha, at_least=0) and self.alpha > 0
        require(is_positive, "model.alpha", self.alpha, "a number > 0", "model.alpha=16")
        object.__setattr__(self, "targets", _names(self.targets))
        is_depth = self.layers is None or is_count(self.layers)
        require(is_depth, "model.layers", self.layers, "a whole number >= 1, or null for all layers", "model.layers=3")
        is_share = is_number(self.dropout, at_least=0, below=1)
        require(is_share, "model.dropout", self.dropout, "a number in [0, 1)", "model.dropout=0.1")
        is_possible = not self.mergeable or self.adapter == "lora"
        require(is_possible, "model.mergeable", self.mergeable, "false without adapters", "model.mergeable=false")

    def find(self) -> PretrainedFiles:
        """Return the verified files of the model. See `fedlearn.data.pretrained_files.find_pretrained`."""
        assert self.path is not None
        return find_pretrained(self.path, revision=self.revision, digest=self.digest)

    def describe(self, files: PretrainedFiles) -> str:
        """Return the model in one line, for the header. Equal lines at two nodes are equal models."""
        tuned = {"lora": f"lora {self.rank}", "full": "all parameters", "head": "head"}[self.adapter]
        where = (
            f" on {self.targets if isinstance(self.targets, str) else ', '.join(self.targets)}" if self.targets else ""
        )
        depth = f", {self.layers} layers" if self.layers is not None and self.adapter != "head" else ""
        kind = f"{where}{', mergeable' if self.mergeable else ''}" if self.adapter == "lora" else ""
        return f"{files.name} ({files.digest[:12]}), {tuned}{kind}{depth}"


def _names(value: Any) -> Any:
    """Return names of maps as a tuple, ``all-linear`` or None."""
    if value is None or value == "all-linear":
        return value
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    is_list = bool(names) and all(isinstance(name, str) and name for name in names)
    expected = "a list of names of affine maps, all-linear, or null"
    require(is_list, "model.targets", value, expected, "'model.targets=[query,value]'")
    return names


def pretrained_network(files: PretrainedFiles, *, length: int) -> Network:
    """Return the description of the network, so that a trained model is built again without data.

    The digest of the base is part of it. So a changed base is refused.
    """
    declared = declared_network(length)
    return replace(declared, arguments={"digest": files.digest, **declared.arguments})


def declared_network(length: int) -> Network:
    """Return the description of the network at a coordinator, which does not have the files of the model."""
    return Network(builder=f"{build_pretrained.__module__}.{build_pretrained.__name__}", arguments={"length": length})


def build_pretrained(
    model: PretrainedModel,
    data: FederatedData,
    *,
    length: int,
    digest: str | None = None,
    framework: str = "torch",
    device: str = "cpu",
) -> tuple[Trainer, str]:
    """Build a trainer for a pretrained model with a head for the task, and describe the model in one line.

    Args:
        model: settings of the model.
        data: data set that defines the task and the number of classes. Its inputs have the fields of
            `fedlearn.data.subword_tokenizer`.
        length: number of tokens of a text.
        digest: expected digest of the files; None takes ``model.digest``.
        framework: ``torch`` (default), ``jax`` or ``mixed``.
        device: device for the computation.

    Raises:
        SettingError: a setting does not fit the model.
        DataError: the files of the model are missing or not safe.
        MissingExtra: the framework, transformers or peft is not installed.
    """
    expected = "a pretrained model, model=hf"
    require(isinstance(model, PretrainedModel), "model", model, expected, "model=hf model.path=my_model")
    files = replace(model, digest=digest or model.digest).find()
    line = model.describe(files)
    options: dict[str, Any] = {"length": length, "device": device}
    if framework == "mixed":
        from fedlearn.trainers.mixed import MixedTrainer

        return MixedTrainer([_build(name, model, files, data, options) for name in ("torch", "jax")]), line
    return _build(framework, model, files, data, options), line


def _build(
    framework: str, model: PretrainedModel, files: PretrainedFiles, data: FederatedData, options: dict[str, Any]
) -> Trainer:
    expected = "torch, jax or mixed"
    require(framework in ("torch", "jax"), "framework", framework, expected, "framework=torch")
    try:
        module = import_module(f"fedlearn.trainers.{framework}.hugging_face")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fedlearn."):
            raise SettingError("framework", framework, "torch for this model", "framework=torch") from error
        raise MissingExtra(f"framework={framework}", framework) from error
    trainer: Trainer = module.build_trainer(model, files, data, **options)
    return trainer


def initial_values(pretrained: Mapping[str, np.ndarray], layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Return the initial parameters.

    Parameters of the checkpoint keep their values. Matrices B of adapters and merged matrices are zero. All others are
    drawn by default.

    Args:
        pretrained: values of the checkpoint, by name in the layout.
        layout: layout of the trained parameters.
        rng: generator of the run.
    """
    tensors = layout.unpack(default_initial_parameters(layout, rng))
    for name, tensor in tensors.items():
        if name in pretrained:
            tensor[...] = pretrained[name]
        elif name.endswith((LORA_B, LORA_MERGED)):
            tensor[...] = 0
    return layout.pack(tensors)


def initializer(pretrained: Mapping[str, np.ndarray]) -> Any:
    """Return an initializer for `fedlearn.TorchTrainer` and `fedlearn.JaxTrainer`; see `initial_values`."""
    return partial(initial_values, pretrained)
