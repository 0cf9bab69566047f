"""Build the two parts of a text pipeline: a tokenizer, and a trainer for its token numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fedlearn.core.federated_data import FederatedData
from fedlearn.data.subword_tokenizer import SubwordTokenizer, load_tokenizer
from fedlearn.data.text_tokenizers import HashingTokenizer
from fedlearn.errors import did_you_mean, require
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.scenario import Network
from fedlearn.trainers.pretrained import PretrainedModel, build_pretrained, pretrained_network
from simulations.models.text import TEXT_CLASSIFIERS, build_text_classifier

# builds a trainer for tokenized data, and describes its model in one line
TrainerFactory = Callable[[FederatedData], tuple[Trainer, str]]


def build_text_pipeline(
    model: Any, *, length: int, vocab_size: int, framework: str = "torch", device: str = "cpu"
) -> tuple[HashingTokenizer | SubwordTokenizer, TrainerFactory]:
    """Build a tokenizer, and a function that builds a trainer for tokenized data.

    Args:
        model: settings of a pretrained model, which is fine-tuned and reads its subwords. Or the name of a model that
            is trained from scratch and reads hashed words. Or a module with inputs ``(B, length)``, the token numbers.
        length: maximum number of tokens of a text; later tokens are dropped.
        vocab_size: number of hash buckets for words; a pretrained model ignores it.
        framework: ``torch`` (default), ``jax`` or ``mixed``.
        device: device for the computation.

    Raises:
        SettingError: a setting is out of range.
        DataError: the files of the pretrained model are not available.
    """
    backend: dict[str, Any] = {"length": length, "framework": framework, "device": device}
    if isinstance(model, PretrainedModel):
        files = model.find()
        tokenizer = load_tokenizer(files.folder, length=length)
        return tokenizer, partial(build_pretrained, model, digest=files.digest, **backend)
    known = not isinstance(model, str) or model in TEXT_CLASSIFIERS
    guess = did_you_mean(str(model), TEXT_CLASSIFIERS) or "cnn"
    expected = f"one of {', '.join(TEXT_CLASSIFIERS)}, minilm, hf, or a module"
    require(known, "model", model, expected, f"model={guess}")
    hashed = HashingTokenizer(vocab_size=vocab_size, length=length)
    return hashed, partial(build_text_classifier, model, vocab_size=vocab_size, **backend)


def text_network(model: Any, *, length: int, vocab_size: int) -> Network:
    """Return the network of `build_text_pipeline` with these arguments."""
    if isinstance(model, PretrainedModel):
        return pretrained_network(model.find(), length=length)
    name = f"{build_text_classifier.__module__}.{build_text_classifier.__name__}"
    return Network(builder=name, arguments={"vocab_size": vocab_size, "length": length})


def digest_of_base(model: Any) -> str:
    """Return the digest of the files of a pretrained model; empty for all other models."""
    return model.find().digest if isinstance(model, PretrainedModel) else ""
