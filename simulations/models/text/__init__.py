"""Trainers of models of text: twins by name, in either framework.

Shapes: T positions, E width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.loop.protocols import Trainer
from simulations.models.twins import build_named_trainer

TEXT_CLASSIFIERS = ("cnn", "bilstm", "transformer")  # one output for a text
LANGUAGE_MODELS = ("lstm", "gru", "transformer")  # one for each position: the next token


def build_text_classifier(
    model: Any, data: FederatedData, *, vocab_size: int, length: int, framework: str = "torch", device: str = "cpu"
) -> tuple[Trainer, str]:
    """A trainer of a model that classifies texts, and one line that describes it.

    Args:
        model: ``cnn``, ``bilstm``, ``transformer``, or a module of your own that takes ``(B, length)`` token numbers.
        data: for the task and the number of classes.
        vocab_size: token numbers run from 0, which pads, to this - 1.
        length: of a text, with its padding.
        framework: ``torch``, ``jax`` or ``mixed``.
        device: where to compute.
    """
    num_outputs = data.num_classes if data.task == "multiclass" else 1
    sizes = (vocab_size, num_outputs)
    made = build_named_trainer(
        "text", model, TEXT_CLASSIFIERS, sizes, data, input_shape=(length,), framework=framework, device=device
    )
    return made, f"{_name(model)}, {vocab_size} tokens, {num_outputs} output{'s' * (num_outputs > 1)}"


def build_language_model(
    model: Any, data: FederatedData, *, vocab_size: int, length: int, framework: str = "torch", device: str = "cpu"
) -> tuple[Trainer, str]:
    """A trainer of a model that tells the next token at each position, and one line that describes it.

    The model is ``lstm``, ``gru``, ``transformer`` (causal), or a module of your own, ``(B, T) -> (B, T, num_tokens)``;
    all else is as for `reader`.
    """
    named = f"next_{model}" if model in LANGUAGE_MODELS else model
    names = tuple(f"next_{name}" for name in LANGUAGE_MODELS)
    how: dict[str, Any] = {"input_shape": (length,), "loss_name": "next_token_loss"}
    made = build_named_trainer("text", named, names, (vocab_size,), data, framework=framework, device=device, **how)
    return made, f"{_name(model)}, {vocab_size} tokens"


def sinusoids(num_positions: int, width: int) -> np.ndarray:
    """``(T, E)`` float32: sines and cosines of wavelengths from 2 pi to 20,000 pi."""
    angle_TE = np.arange(num_positions)[:, None] / 10_000.0 ** (np.arange(width // 2) * 2 / width)
    return np.concatenate([np.sin(angle_TE), np.cos(angle_TE)], axis=1).astype(np.float32)


def _name(model: Any) -> str:
    return model if isinstance(model, str) else type(model).__name__
