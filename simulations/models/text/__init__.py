"""Build trainers for text models, in both frameworks.

Shapes: T positions, E width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.loop.protocols import Trainer
from simulations.models.twins import build_named_trainer

TEXT_CLASSIFIERS = ("cnn", "bilstm", "lstm", "gru", "transformer")  # one output per text
TAGGERS = ("gru", "bilstm")  # one output per token
LANGUAGE_MODELS = ("lstm", "gru", "transformer")  # one output per position, for the next token


def build_text_classifier(
    model: Any, data: FederatedData, *, vocab_size: int, length: int, framework: str = "torch", device: str = "cpu"
) -> tuple[Trainer, str]:
    """Build a trainer for a text classifier, and describe the model in one line.

    Args:
        model: ``cnn``, ``bilstm``, ``lstm``, ``gru``, ``transformer``, or a module with inputs ``(B, length)``, the
            token numbers.
        data: data set that defines the task and the number of classes.
        vocab_size: number of tokens; token numbers are below it, and 0 is padding.
        length: number of tokens of a text, including padding.
        framework: ``torch`` (default), ``jax`` or ``mixed``.
        device: device for the computation.
    """
    num_outputs = data.task.num_outputs(data.num_classes)
    sizes = (vocab_size, num_outputs)
    trainer = build_named_trainer(
        "text", model, TEXT_CLASSIFIERS, sizes, data, input_shape=(length,), framework=framework, device=device
    )
    return trainer, f"{_name(model)}, {vocab_size} tokens, {num_outputs} output{'s' * (num_outputs > 1)}"


def build_language_model(
    model: Any, data: FederatedData, *, vocab_size: int, length: int, framework: str = "torch", device: str = "cpu"
) -> tuple[Trainer, str]:
    """Build a trainer for a model that predicts the next token at each position, and describe it in one line.

    Args:
        model: ``lstm``, ``gru``, ``transformer`` (causal), or a module that maps ``(B, T)`` to ``(B, T, vocab_size)``.
        data: data set that defines the task.
        vocab_size: number of tokens; token numbers are below it, and 0 is padding.
        length: number of tokens of a text, including padding.
        framework: ``torch`` (default), ``jax`` or ``mixed``.
        device: device for the computation.
    """
    function = f"next_{model}" if model in LANGUAGE_MODELS else model
    names = tuple(f"next_{name}" for name in LANGUAGE_MODELS)
    options: dict[str, Any] = {"input_shape": (length,), "loss_name": "next_token_loss"}
    trainer = build_named_trainer(
        "text", function, names, (vocab_size,), data, framework=framework, device=device, **options
    )
    return trainer, f"{_name(model)}, {vocab_size} tokens"


def build_tagger(
    model: Any, data: FederatedData, *, vocab_size: int, length: int, framework: str = "torch", device: str = "cpu"
) -> tuple[Trainer, str]:
    """Build a trainer for a model with one class per token, and describe it in one line.

    Args:
        model: ``gru`` or ``bilstm``, both bidirectional, or a module that maps ``(B, T)`` to ``(B, T, C)``.
        data: data set that defines the task and the number of classes.
        vocab_size: number of tokens; token numbers are below it, and 0 is padding.
        length: number of tokens of a sentence, including padding.
        framework: ``torch`` (default), ``jax`` or ``mixed``.
        device: device for the computation.
    """
    function = f"tag_{model}" if model in TAGGERS else model
    names, sizes = tuple(f"tag_{name}" for name in TAGGERS), (vocab_size, data.num_classes)
    trainer = build_named_trainer(
        "text", function, names, sizes, data, input_shape=(length,), framework=framework, device=device
    )
    return trainer, f"{_name(model)}, {vocab_size} tokens, {data.num_classes} outputs per token"


def sinusoids(num_positions: int, width: int) -> np.ndarray:
    """Return sines and cosines of wavelengths from 2 pi to 20,000 pi, ``(T, E)``, float32."""
    angle_TE = np.arange(num_positions)[:, None] / 10_000.0 ** (np.arange(width // 2) * 2 / width)
    return np.concatenate([np.sin(angle_TE), np.cos(angle_TE)], axis=1).astype(np.float32)


def _name(model: Any) -> str:
    return model if isinstance(model, str) else type(model).__name__
