"""A model of transformers as pure functions of its trained parameters.

Shapes: B batch, T tokens, C outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import copy
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlearn.core.adapters import LORA_A, LORA_B, LORA_MERGED
from fedlearn.core.layout import Layout
from fedlearn.core.random import Purpose, generator
from fedlearn.data.pretrained_files import CONFIG, WEIGHTS, PretrainedFiles
from fedlearn.errors import require
from fedlearn.trainers.jax.frozen import FrozenArrays
from fedlearn.trainers.jax.leaves import PARAMS
from fedlearn.trainers.jax.pretrained import decoder, encoder
from fedlearn.trainers.jax.pretrained.config import ModelConfig, read_config
from fedlearn.trainers.jax.pretrained.layers import Cache, ForwardPass
from fedlearn.trainers.jax.pretrained.lora import adapted_layers, adapter_shapes, trained_whole
from fedlearn.trainers.jax.pretrained.weights import read_weights, write_tensors
from fedlearn.trainers.pretrained import CAUSAL, PretrainedModel, initializer

Params = Mapping[str, Any]
PREFIXES = {"gpt2": "transformer.", **dict.fromkeys(("llama", "mistral", "qwen2"), "model.")}


class TransformerModel:
    """Hold a model of transformers, and run it with trained parameters. It is a `Network` of the JAX trainer.

    Args:
        values: the parsed ``config.json``.
        weights: parameters by their names in transformers. Missing ones are drawn and trained.
        task: name of the task; ``causal_lm`` for a decoder.
        num_labels: number of outputs of the head of an encoder.
        tuning: settings of the fine-tuning; None trains all parameters.

    Attributes:
        config: sizes of the model.
        trained: shapes of the trained parameters, by name.
        weights: initial variables.

    *Guarantees*:

    - Trained parameters have the names and axes of `fedlearn.trainers.torch.hugging_face`: the names of transformers,
      and of peft for adapters.
    - Frozen parameters are in memory once, in the types of their file. They are arguments of each program.

    Raises:
        SettingError: the configuration or a setting is not supported.
    """

    is_flax, draws_weights = False, False

    def __init__(
        self,
        values: Mapping[str, Any],
        weights: Params,
        *,
        task: str,
        num_labels: int = 2,
        tuning: PretrainedModel | None = None,
    ) -> None:
        self.values, self.config, self.task, self.num_labels = dict(values), read_config(values), task, num_labels
        self._scale = 1.0 if tuning is None else tuning.alpha / tuning.rank
        self._dropout = 0.0 if tuning is None else tuning.dropout
        shapes = parameter_shapes(self.config, task, num_labels)
        whole, self.adapted = self._choose(shapes, weights, tuning)
        self.trained = {name: shapes[name] for name in whole} | self._adapter_shapes(tuning)
        self.pretrained = {name: np.asarray(weights[name], np.float32) for name in whole if name in weights}
        self._frozen = FrozenArrays({n: jnp.asarray(v) for n, v in weights.items() if n in shapes and n not in whole})
        self.jit = self._frozen.jit
        layout = Layout.from_shapes(self.trained.items())
        self.initial = initializer(self.pretrained)
        initial_D = self.initial(layout, generator(0, Purpose.INIT))
        self.weights: Mapping[str, Any] = {PARAMS: layout.unpack(initial_D)}

    def _choose(
        self, shapes: Mapping[str, Any], weights: Params, tuning: PretrainedModel | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the parameters that are trained whole, and of the layers with adapters."""
        if tuning is None:
            return tuple(shapes), ()
        depth, kind = self.config.num_layers, self.config.kind
        outside = head_names(self.config, self.task, self.num_labels)
        head = tuple(name for name in shapes if name in outside or name not in weights)
        has_head = tuning.adapter != "head" or bool(head)
        expected = "lora or full: the model has no new head"
        require(has_head, "model.adapter", tuning.adapter, expected, "model.adapter=lora")
        whole = trained_whole(tuning, tuple(shapes), head=head, depth=depth)
        if tuning.adapter != "lora":
            return whole, ()
        layers = [n for n in affine_shapes(self.config, self.task, self.num_labels) if f"{n}.weight" not in head]
        return whole, adapted_layers(tuning, layers, kind=kind, depth=depth)

    def _adapter_shapes(self, tuning: PretrainedModel | None) -> dict[str, tuple[int, ...]]:
        if tuning is None:
            return {}
        affine = affine_shapes(self.config, self.task, self.num_labels)
        result: dict[str, tuple[int, ...]] = {}
        for name in self.adapted:
            result |= adapter_shapes(name, *affine[name], tuning)
        return result

    @property
    def module(self) -> TransformerModel:
        """The model itself, as the trainer expects of a `Network`."""
        return self

    def forward(self, params: Params, key: jax.Array | None = None) -> ForwardPass:
        """Return a pass with these trained parameters; ``key`` is the key of the dropout in training mode."""
        first = next(iter(params.values()))
        return ForwardPass(
            params={**self._frozen.current, **params},
            dtype=first.dtype,
            adapters={n: (params[f"{n}{LORA_A}"], params[f"{n}{LORA_B}"]) for n in self.adapted},
            merged={n: params[f"{n}{LORA_MERGED}"] for n in self.adapted if f"{n}{LORA_MERGED}" in params},
            scale=self._scale,
            adapter_dropout=self._dropout,
            head_dropout=self._dropout,
            key=key,
            swapped=self.config.kind == "gpt2",
        )

    def apply(self, params: Params, x: Any, *, key: jax.Array | None = None) -> jax.Array:
        """Return the logits: ``(B, C)`` for texts, ``(B, T, C)`` for tokens.

        Args:
            params: trained parameters by name.
            x: token ids ``(B, T)``, or a mapping with ``input_ids``, and optionally ``attention_mask`` and
                ``token_type_ids``.
            key: key of the dropout; None in evaluation mode.
        """
        x = x if isinstance(x, Mapping) else {"input_ids": x}
        inputs = {name: part.astype(jnp.int32) for name, part in x.items()}
        if self.config.is_encoder:
            return encoder.run(self.config, self.task, self.forward(params, key), inputs)
        return decoder.run(self.config, self.forward(params, key), inputs)[0]

    def continue_with(
        self, params: Params, ids_BT: jax.Array, cache: list[Cache], start: Any
    ) -> tuple[jax.Array, list[Cache]]:
        """Return the logits of the next tokens of a decoder, and the keys and values with these tokens."""
        return decoder.run(self.config, self.forward(params), {"input_ids": ids_BT}, cache, start)

    def __call__(self, x: Any) -> jax.Array:
        """Return the logits in evaluation mode, with the parameters of the model."""
        outputs: jax.Array = self.jit(self.apply)(self.weights[PARAMS], x)
        return outputs

    def init(self, key: jax.Array, x: Any) -> Mapping[str, Any]:
        """Return the initial variables. Key and inputs are not used."""
        return self.weights

    def predict(self, variables: Mapping[str, Any], x: Any) -> jax.Array:
        """Return the outputs in evaluation mode."""
        return self.apply(variables[PARAMS], x)

    def train(self, variables: Mapping[str, Any], x: Any, real_B: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """Return the outputs in training mode. There are no batch statistics."""
        return self.apply(variables[PARAMS], x, key=key), {}

    def written(self, variables: Mapping[str, Any], x: Any, key: jax.Array) -> Mapping[str, Any]:
        """Return nothing, because a pass writes no state."""
        return {}

    def built(self, variables: Mapping[str, Any]) -> TransformerModel:
        """Return the model with these trained parameters. It shares the frozen ones."""
        other = copy(self)
        other.weights = {PARAMS: {name: jnp.asarray(v) for name, v in variables[PARAMS].items()}}
        return other

    def merged(self) -> dict[str, np.ndarray]:
        """Return all parameters of the base model, with the adapters added to the weights of their layers."""
        run_pass = self.forward(self.weights[PARAMS])
        names = parameter_shapes(self.config, self.task, self.num_labels)
        arrays = {name: np.asarray(run_pass.params[name], np.float32) for name in names}
        for layer, (low, high) in run_pass.adapters.items():
            product = np.asarray(high, np.float32) @ np.asarray(low, np.float32)
            change = self._scale * (product + np.asarray(run_pass.merged.get(layer, 0), np.float32))
            arrays[f"{layer}.weight"] = arrays[f"{layer}.weight"] + (change.T if run_pass.swapped else change)
        return arrays

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the merged model as a folder that ``from_pretrained`` of transformers loads."""
        path, values = Path(folder), {**self.values, "dtype": "float32"}
        path.mkdir(parents=True, exist_ok=True)
        if self.config.is_encoder:
            labels = [f"LABEL_{number}" for number in range(self.num_labels)]
            values |= {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
        write_tensors(path / WEIGHTS, self.merged())
        (path / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_model(
    files: PretrainedFiles, *, task: str, num_labels: int = 2, tuning: PretrainedModel | None = None
) -> TransformerModel:
    """Load a model of transformers.

    Args:
        files: files of the model; see `fedlearn.data.pretrained_files.find_pretrained`.
        task: name of the task; ``causal_lm`` for a decoder.
        num_labels: number of outputs of the head of an encoder.
        tuning: settings of the fine-tuning; None trains all parameters.

    Raises:
        SettingError: the model or a setting is not supported in JAX.
        DataError: the weights do not fit the configuration.
    """
    config = read_config(files.config)
    shapes, head = parameter_shapes(config, task, num_labels), head_names(config, task, num_labels)
    prefix = PREFIXES.get(config.kind, f"{config.kind}.")
    weights = read_weights(files.folder, shapes, prefix=prefix, replaceable=head)
    return TransformerModel(files.config, weights, task=task, num_labels=num_labels, tuning=tuning)


def affine_shapes(config: ModelConfig, task: str, num_labels: int) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of each affine layer, by name."""
    if config.is_encoder:
        return encoder.affine_shapes(config, task, num_labels)
    return decoder.affine_shapes(config)


def parameter_shapes(config: ModelConfig, task: str, num_labels: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, by their names in transformers."""
    config.require_task(task)
    return encoder.shapes(config, task, num_labels) if config.is_encoder else decoder.shapes(config)


def head_names(config: ModelConfig, task: str, num_labels: int) -> tuple[str, ...]:
    """Return the names of the parameters of the head, which is trained with all adapters; a decoder has none."""
    if task == CAUSAL:
        return ()
    return tuple(n for n in parameter_shapes(config, task, num_labels) if not n.startswith(f"{config.kind}."))
