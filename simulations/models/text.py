"""Trainers of models of text: twins by name, in either framework.

Shapes: T positions, E width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlearn.data.federated import FederatedData
from fedlearn.trainers.base import Trainer
from simulations.models.twins import twins

READERS = ("cnn", "bilstm", "transformer")  # one output for a text
WRITERS = ("lstm", "gru", "transformer")  # one for each position: the next token


def reader(
    model: Any, data: FederatedData, *, num_tokens: int, length: int, framework: str = "torch", device: str = "cpu"
) -> tuple[Trainer, str]:
    """A trainer of a model that classifies texts, and one line that describes it.

    Args:
        model: ``cnn``, ``bilstm``, ``transformer``, or a module of your own that takes ``(B, length)`` token numbers.
        data: for the task and the number of classes.
        num_tokens: token numbers run from 0, which pads, to this - 1.
        length: of a text, with its padding.
        framework: ``torch``, ``jax`` or ``mixed``.
        device: where to compute.
    """
    num_outputs = data.num_classes if data.task == "multiclass" else 1
    sizes = (num_tokens, num_outputs)
    made = twins("text", model, READERS, sizes, data, shape=(length,), framework=framework, device=device)
    return made, f"{_name(model)}, {num_tokens} tokens, {num_outputs} output{'s' * (num_outputs > 1)}"


def writer(
    model: Any, data: FederatedData, *, num_tokens: int, length: int, framework: str = "torch", device: str = "cpu"
) -> tuple[Trainer, str]:
    """A trainer of a model that tells the next token at each position, and one line that describes it.

    The model is ``lstm``, ``gru``, ``transformer`` (causal), or a module of your own, ``(B, T) -> (B, T, num_tokens)``;
    all else is as for `reader`.
    """
    named = f"next_{model}" if model in WRITERS else model
    names = tuple(f"next_{name}" for name in WRITERS)
    how: dict[str, Any] = {"shape": (length,), "loss": "next_token_loss"}
    made = twins("text", named, names, (num_tokens,), data, framework=framework, device=device, **how)
    return made, f"{_name(model)}, {num_tokens} tokens"


def sinusoids(positions: int, width: int) -> np.ndarray:
    """``(T, E)`` float32: sines and cosines of wavelengths from 2 pi to 20,000 pi."""
    angle_TE = np.arange(positions)[:, None] / 10_000.0 ** (np.arange(width // 2) * 2 / width)
    return np.concatenate([np.sin(angle_TE), np.cos(angle_TE)], axis=1).astype(np.float32)


def _name(model: Any) -> str:
    return model if isinstance(model, str) else type(model).__name__
