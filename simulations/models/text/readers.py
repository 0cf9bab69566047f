"""Build the two parts of a text pipeline: a tokenizer, and a trainer for its token numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from os import PathLike
from typing import Any

from fedlearn.core.federated_data import FederatedData
from fedlearn.data.text_tokenizers import HashingTokenizer, WordPieceTokenizer
from fedlearn.errors import did_you_mean, require
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.scenario import Network
from simulations.datasets.minilm import load_minilm
from simulations.models.encoder import FineTuning, PretrainedEncoder, build_fine_tuning_trainer
from simulations.models.text import TEXT_CLASSIFIERS, build_text_classifier

MODELS = ("minilm", *TEXT_CLASSIFIERS)
# builds a trainer for tokenized data, and describes its model in one line
TrainerFactory = Callable[[FederatedData], tuple[Trainer, str]]


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
    """Build a tokenizer, and a function that builds a trainer for tokenized data.

    Args:
        model: name or module. ``minilm`` is a pretrained encoder that is fine-tuned. ``cnn``, ``bilstm`` and
            ``transformer`` are trained from scratch. A module has inputs ``(B, length)``, the token numbers.
        length: maximum number of tokens of a text; later tokens are dropped.
        vocab_size: number of hash buckets for words. ``minilm`` ignores it. None: all models use the word pieces of
            MiniLM.
        tuning: settings of the fine-tuning of ``minilm``; None uses the defaults of `FineTuning`.
        encoder_path: folder with the files of MiniLM; None searches for them.
        framework: ``torch`` (default), ``jax`` or ``mixed``.
        device: device for the computation.

    Raises:
        SettingError: A setting is out of range.
        DataError: The files of MiniLM are needed and are not available.
    """
    known = not isinstance(model, str) or model in MODELS
    guess = did_you_mean(str(model), MODELS) or "cnn"
    require(known, "model", model, f"one of {', '.join(MODELS)}, or a module", f"model={guess}")
    backend: dict[str, Any] = {"framework": framework, "device": device}
    if model != "minilm" and vocab_size is not None:
        tokenizer = HashingTokenizer(vocab_size=vocab_size, length=length)
        return tokenizer, partial(build_text_classifier, model, vocab_size=vocab_size, length=length, **backend)
    pretrained, pieces, place = load_minilm(length=length, path=encoder_path)
    if model != "minilm":
        return pieces, partial(
            build_text_classifier, model, vocab_size=pretrained.config.vocab_size, length=length, **backend
        )
    return pieces, partial(_build_fine_tuned, pretrained, tuning or FineTuning(), place, **backend)


def text_network(
    model: Any,
    *,
    length: int,
    vocab_size: int | None = None,
    tuning: FineTuning | None = None,
    encoder_path: str | PathLike[str] | None = None,
) -> Network:
    """Return the network of `build_text_pipeline` with these arguments."""
    arguments: dict[str, Any] = {"length": length, "vocab_size": vocab_size}
    if model == "minilm":
        arguments |= {"tuning": asdict(tuning or FineTuning()), "encoder_path": encoder_path and str(encoder_path)}
    return Network(builder="simulations.models.text.readers.build_text_network", arguments=arguments)


def build_text_network(
    model: Any,
    data: FederatedData,
    *,
    length: int,
    vocab_size: int | None = None,
    tuning: Mapping[str, Any] | None = None,
    encoder_path: str | None = None,
    framework: str = "torch",
    device: str = "cpu",
) -> tuple[Trainer, str]:
    """Build the trainer of a text pipeline; see `build_text_pipeline` for the arguments.

    The frozen weights of ``minilm`` are not part of a trained model. They are read from their files again.
    """
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in (tuning or {}).items()}
    _, build = build_text_pipeline(
        model,
        length=length,
        vocab_size=vocab_size,
        tuning=FineTuning(**settings) if settings else None,
        encoder_path=encoder_path,
        framework=framework,
        device=device,
    )
    return build(data)


def _build_fine_tuned(
    pretrained: PretrainedEncoder, tuning: FineTuning, place: str, data: FederatedData, **backend: Any
) -> tuple[Trainer, str]:
    trainer, line = build_fine_tuning_trainer(pretrained, tuning, data, **backend)
    return trainer, f"{line}, from {place}"
