"""Build a pretrained model of transformers with adapters in JAX, and train it.

The outputs equal the ones of `fedlearn.trainers.torch.hugging_face`.

Shapes: B batch, N texts, T tokens, W words, C outputs, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.inputs import join_inputs
from fedlearn.core.records import Array
from fedlearn.data.pretrained_files import PretrainedFiles
from fedlearn.data.subword_tokenizer import IDS, IGNORED, LABELS, MASK, POSITIONS
from fedlearn.errors import require
from fedlearn.trainers.jax.pretrained.generation import generate
from fedlearn.trainers.jax.pretrained.model import TransformerModel, load_model
from fedlearn.trainers.jax.trainer import JaxTrainer
from fedlearn.trainers.pretrained import CAUSAL, TOKENS, PretrainedModel

PREDICTED_LOGITS = 2**23  # logits of a forward pass in an evaluation, 32 MiB
PREDICTED_TOKENS = 8192  # tokens of a forward pass in an evaluation
Outputs = Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]  # (logits, inputs) -> outputs


def build_trainer(
    model: PretrainedModel, files: PretrainedFiles, data: FederatedData, *, length: int, device: str = "cpu"
) -> JaxTrainer:
    """Return a trainer; see `fedlearn.trainers.pretrained.build_pretrained`.

    Raises:
        SettingError: the model or a setting is not supported in JAX.
        DataError: the weights do not fit the configuration.
    """
    task = data.task.name
    num_labels = 2 if task == "binary" else data.task.num_outputs(data.num_classes)
    fix = "model.gradient_checkpointing=false"
    require(not model.gradient_checkpointing, "model.gradient_checkpointing", True, "false with framework=jax", fix)
    loaded = load_model(files, task=task, num_labels=num_labels, tuning=model)
    most = loaded.config.num_positions
    expected = f"at most {most}, the number of positions of the model"
    require(length <= most, "length", length, expected, f"length={most}")
    network = HuggingFaceNetwork(loaded, OUTPUTS.get(task, _logits))
    trainer = HuggingFaceTrainer(network, task=data.task, initial=loaded.initial, device=device)
    trainer.pretrained, trainer.files = model, files
    return trainer


class HuggingFaceNetwork:
    """Run a model of transformers, and return the outputs of a task.

    Args:
        model: the model. It reads the fields ``input_ids`` and ``attention_mask``.
        outputs: function from the logits and all inputs to the outputs.
    """

    is_flax, draws_weights = False, False

    def __init__(self, model: TransformerModel, outputs: Outputs) -> None:
        self.model, self.jit = model, model.jit
        self.weights, self._outputs = model.weights, outputs
        self.init, self.written, self.built = model.init, model.written, model.built

    @property
    def module(self) -> HuggingFaceNetwork:
        """The network itself, as the trainer expects."""
        return self

    def __call__(self, x: Mapping[str, Any]) -> jax.Array:
        """Return the outputs in evaluation mode, with the parameters of the model."""
        return self.predict(self.weights, x)

    def predict(self, variables: Mapping[str, Any], x: Mapping[str, Any]) -> jax.Array:
        """Return the outputs in evaluation mode."""
        return self._outputs(self.model.predict(variables, _tokens(x)), x)

    def train(
        self, variables: Mapping[str, Any], x: Mapping[str, Any], real_B: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Return the outputs in training mode. There are no batch statistics."""
        logits, changed = self.model.train(variables, _tokens(x), real_B, key)
        return self._outputs(logits, x), changed


class HuggingFaceTrainer(JaxTrainer):
    """Train a network of transformers. Evaluations need little memory.

    Attributes:
        pretrained: settings of the model.
        files: files of the model.
    """

    pretrained: PretrainedModel
    files: PretrainedFiles

    def predict(self, params_D: Array, x: Any) -> np.ndarray:
        """Return the outputs of each text: ``(N, C)``, ``(N, W, C)`` for words, or ``(N, 3)`` for ``causal_lm``."""
        x = join_inputs(x)
        if not len(x):
            return super().predict(params_D, x)
        width = x[MASK].shape[1]
        logits = self.module.model.config.vocab_size if self.task.name == CAUSAL else 1
        size = max(1, min(PREDICTED_TOKENS, PREDICTED_LOGITS // logits) // width)
        parts = [super(HuggingFaceTrainer, self).predict(params_D, x[n : n + size]) for n in range(0, len(x), size)]
        return np.concatenate(parts)

    def generate(
        self, params_D: Array, ids: Sequence[int], *, num_tokens: int, temperature: float, seed: int
    ) -> list[int]:
        """Return the tokens that continue a text, until the end token of the model. Equal arguments give equal tokens.

        Args:
            params_D: parameters.
            ids: token numbers of the beginning, at least one.
            num_tokens: largest number of new tokens, >= 1. The positions of the model may allow fewer.
            temperature: softmax temperature, >= 0; 0 takes the most likely token.
            seed: seed of the draws.
        """
        model: TransformerModel = self.network(params_D)
        end = self.files.config.get("eos_token_id")
        stops = () if end is None else tuple(end) if isinstance(end, list) else (end,)
        count = max(1, min(num_tokens, model.config.num_positions - len(ids)))
        options: dict[str, Any] = {"num_tokens": count, "temperature": temperature, "seed": seed}
        tokens = generate(model, [list(ids)], stop_tokens=stops, **options)[0, len(ids) :].tolist()
        return tokens[: next((n for n, token in enumerate(tokens) if token in stops), count) + 1]


def _tokens(x: Mapping[str, Any]) -> dict[str, Any]:
    return {IDS: x[IDS], MASK: x[MASK]}


def _logits(logits_BC: jax.Array, x: Mapping[str, jax.Array]) -> jax.Array:
    return logits_BC


def _difference(logits_B2: jax.Array, x: Mapping[str, jax.Array]) -> jax.Array:
    """Return the logit of the second class of each text, ``(B, 1)``."""
    return logits_B2[:, 1:] - logits_B2[:, :1]


def _of_words(logits_BTC: jax.Array, x: Mapping[str, jax.Array]) -> jax.Array:
    """Return the logits at the first subword of each word, ``(B, W, C)``."""
    places_BW = jnp.maximum(x[POSITIONS].astype(jnp.int32), 0)
    return jnp.take_along_axis(logits_BTC, places_BW[:, :, None], axis=1)


def score_tokens(logits_BTV: jax.Array, x: Mapping[str, jax.Array]) -> jax.Array:
    """Return the three outputs of each text, ``(B, 3)``; see `fedlearn.core.tasks.language`."""
    logits_BTV, next_BT = logits_BTV[:, :-1].astype(jnp.float32), x[LABELS][:, 1:].astype(jnp.int32)
    is_counted_BT = next_BT != IGNORED
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.where(is_counted_BT, next_BT, 0))
    is_correct_BT = (jnp.argmax(logits_BTV, axis=-1) == next_BT) & is_counted_BT
    columns = (jnp.where(is_counted_BT, nll_BT, 0.0), is_correct_BT, is_counted_BT)
    return jnp.stack([column.sum(axis=1).astype(jnp.float32) for column in columns], axis=1)


OUTPUTS: Mapping[str, Outputs] = {"binary": _difference, TOKENS: _of_words, CAUSAL: score_tokens}
