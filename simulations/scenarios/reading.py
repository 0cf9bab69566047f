"""From texts to a trainer: what numbers a text, and what reads the numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

from fedlearn.data.federated import FederatedData
from fedlearn.errors import did_you_mean, require
from fedlearn.trainers.base import Trainer
from simulations.models.encoder import Pretrained, Tuning, fine_tuned
from simulations.models.text import READERS, reader
from simulations.scenarios.minilm import Pieces, minilm
from simulations.scenarios.words import Words

MODELS = ("minilm", *READERS)
Fitted = Callable[[FederatedData], tuple[Trainer, str]]  # a trainer for data of such numbers, and a line about it


def reading(
    model: Any,
    *,
    length: int,
    num_tokens: int | None = None,
    tuning: Tuning | None = None,
    encoder: str | PathLike[str] | None = None,
    framework: str = "torch",
    device: str = "cpu",
) -> tuple[Words | Pieces, Fitted]:
    """What numbers texts, and what makes a trainer for data of such numbers.

    Args:
        model: ``minilm``, a pretrained encoder that is tuned; ``cnn``, ``bilstm``, ``transformer``, which begin from
            nothing; or a module of your own that takes ``(B, length)`` token numbers.
        length: tokens of a text that are read.
        num_tokens: numbers for words, hashed, which all but ``minilm`` read; None: all read its word pieces.
        tuning: of ``minilm``; None is `Tuning`'s own.
        encoder: a folder with MiniLM's files; None searches for them.
        framework: ``torch``, ``jax`` or ``mixed``.
        device: where to compute.

    Raises:
        SettingError: a setting is out of range.
        DataError: the encoder is asked for and cannot be had.
    """
    known = not isinstance(model, str) or model in MODELS
    guess = did_you_mean(str(model), MODELS) or "cnn"
    require(known, "model", model, f"one of {', '.join(MODELS)}, or a module of your own", f"model={guess}")
    where: dict[str, Any] = {"framework": framework, "device": device}
    if model != "minilm" and num_tokens is not None:
        words = Words(num_tokens=num_tokens, length=length)
        return words, partial(reader, model, num_tokens=num_tokens, length=length, **where)
    pretrained, pieces, place = minilm(length=length, path=encoder)
    if model != "minilm":
        return pieces, partial(reader, model, num_tokens=pretrained.sizes.num_tokens, length=length, **where)
    return pieces, partial(_tuned, pretrained, tuning or Tuning(), place, **where)


def _tuned(
    pretrained: Pretrained, tuning: Tuning, place: str, data: FederatedData, **where: Any
) -> tuple[Trainer, str]:
    trainer, line = fine_tuned(pretrained, tuning, data, **where)
    return trainer, f"{line}, from {place}"
