"""From texts to a trainer: what numbers a text, and what reads the numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

from fedlearn.core.federated_data import FederatedData
from fedlearn.errors import did_you_mean, require
from fedlearn.loop.protocols import Trainer
from simulations.datasets.hashing_tokenizer import HashingTokenizer
from simulations.datasets.minilm import WordPieceTokenizer, load_minilm
from simulations.models.encoder import FineTuning, PretrainedEncoder, build_fine_tuning_trainer
from simulations.models.text import TEXT_CLASSIFIERS, build_text_classifier

MODELS = ("minilm", *TEXT_CLASSIFIERS)
TrainerFactory = Callable[
    [FederatedData], tuple[Trainer, str]
]  # a trainer for data of such numbers, and a line about it


def build_text_pipeline(
    model: Any,
    *,
    length: int,
    vocab_size: int | None = None,
    tuning: FineTuning | None = None,
    encoder_path: str | PathLike[str] | None = None,
    framework: str = "torch",
    device: str = "cpu",
) -> tuple[HashingTokenizer | WordPieceTokenizer, TrainerFactory]:
    """What numbers texts, and what makes a trainer for data of such numbers.

    Args:
        model: ``minilm``, a pretrained encoder that is tuned; ``cnn``, ``bilstm``, ``transformer``, which begin from
            nothing; or a module of your own that takes ``(B, length)`` token numbers.
        length: tokens of a text that are read.
        vocab_size: numbers for words, hashed, which all but ``minilm`` read; None: all read its word pieces.
        tuning: of ``minilm``; None is `FineTuning`'s own.
        encoder_path: a folder with MiniLM's files; None searches for them.
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
    if model != "minilm" and vocab_size is not None:
        words = HashingTokenizer(vocab_size=vocab_size, length=length)
        return words, partial(build_text_classifier, model, vocab_size=vocab_size, length=length, **where)
    pretrained, pieces, place = load_minilm(length=length, path=encoder_path)
    if model != "minilm":
        return pieces, partial(
            build_text_classifier, model, vocab_size=pretrained.config.vocab_size, length=length, **where
        )
    return pieces, partial(_tuned, pretrained, tuning or FineTuning(), place, **where)


def _tuned(
    pretrained: PretrainedEncoder, tuning: FineTuning, place: str, data: FederatedData, **where: Any
) -> tuple[Trainer, str]:
    trainer, line = build_fine_tuning_trainer(pretrained, tuning, data, **where)
    return trainer, f"{line}, from {place}"
