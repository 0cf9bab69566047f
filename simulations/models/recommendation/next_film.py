"""Predict the next film of a user with a small decoder, in both frameworks.

A film is a token: film n has the number n + 1, and 0 is padding. An example is a part of the films of a user in the
order of time. It has four outputs. The first three are the outputs of `fedlearn.core.tasks.language`: total negative
log-likelihood, correct films and counted films. The fourth is the rank of the held-out film among its candidates. It is
0 if there are no candidates, as in training.

Shapes: N sequences, T films of a sequence, L candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.inputs import join_inputs
from fedlearn.core.layout import default_initial_parameters
from fedlearn.core.metric import Metric, Sums, divide_sums
from fedlearn.core.records import Examples
from fedlearn.core.tasks.language import CAUSAL_LM
from fedlearn.core.tasks.ranking import CUTOFF
from fedlearn.data.subword_tokenizer import IDS, IGNORED, LABELS, MASK
from fedlearn.errors import require
from fedlearn.loop.protocols import Trainer
from fedlearn.trainers.mixed import MixedTrainer
from simulations.models import load_family

MODEL = "decoder"
NUM_OUTPUTS = 4
RANK = 3  # column of the rank


def _loss(outputs: Any, targets: Any) -> Any:
    """Return the mean loss of the counted films of each sequence, in arrays of either framework."""
    return outputs[:, 0] / outputs[:, 2].clip(1)


def _hits(outputs_N4: np.ndarray, targets_N: np.ndarray) -> Sums:
    rank_N = outputs_N4[:, RANK]
    is_hit_N = (rank_N > 0) & (rank_N <= CUTOFF)
    gain_N = np.where(is_hit_N, 1 / np.log2(1 + np.maximum(rank_N, 1)), 0.0)
    return {"hits": is_hit_N * 1.0, "gain": gain_N, "lists": (rank_N > 0) * 1.0}


def _hit_rate(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    return divide_sums(totals, "hits", "lists")


def _gain(totals: Mapping[str, np.ndarray]) -> np.ndarray:
    return divide_sums(totals, "gain", "lists")


NEXT_FILM = replace(
    CAUSAL_LM,
    name=f"{__name__}.NEXT_FILM",
    metrics=(
        *CAUSAL_LM.metrics[:2],
        Metric(name=f"hr@{CUTOFF}", sums=_hits, finish=_hit_rate),
        Metric(name=f"ndcg@{CUTOFF}", sums=_hits, finish=_gain),
    ),
    main_metric=f"hr@{CUTOFF}",
    loss=_loss,
    num_outputs=lambda num_classes: NUM_OUTPUTS,
)


def training_sequences(history: np.ndarray, *, length: int, num_candidates: int) -> Examples:
    """Return the parts of the films of a user. Each film but the first counts once.

    Args:
        history: films of the user in the order of time.
        length: largest number of films of a part, >= 2. Parts have one film in common.
        num_candidates: number L of candidates of a held-out film.
    """
    starts = range(0, max(1, len(history) - 1), length - 1)
    parts = [history[start : start + length] for start in starts]
    return _examples(parts, [part[1:] for part in parts], length, np.zeros((len(parts), num_candidates), np.int64) - 1)


def test_sequence(history: np.ndarray, wanted: np.ndarray, others: np.ndarray, *, length: int) -> Examples:
    """Return the last films of a user with the held-out film, which alone counts; empty without one.

    Args:
        history: films of the user in the order of time.
        wanted: the held-out film, or nothing.
        others: films that are ranked together with the held-out film.
        length: largest number of films of a sequence.
    """
    parts = [np.concatenate([history[1 - length :], wanted])] if len(wanted) else []
    candidates_NL = np.concatenate([wanted, others])[None] if len(wanted) else np.zeros((0, len(others) + 1), np.int64)
    return _examples(parts, [wanted] * len(parts), length, candidates_NL)


def _examples(parts: list[np.ndarray], counted: list[np.ndarray], length: int, candidates_NL: np.ndarray) -> Examples:
    """Return sequences with padding at the end. The last films of each part are the counted ones."""
    ids_NT = np.zeros((len(parts), length), np.int32)
    labels_NT = np.full((len(parts), length), IGNORED, np.int32)
    for row, (part, last) in enumerate(zip(parts, counted, strict=True)):
        ids_NT[row, : len(part)] = part + 1
        labels_NT[row, len(part) - len(last) : len(part)] = last + 1
    x = {IDS: ids_NT, MASK: (ids_NT > 0).astype(np.int32), LABELS: labels_NT}
    return Examples(
        join_inputs({**x, "candidates": (candidates_NL + 1).astype(np.int32)}), (labels_NT != IGNORED).sum(axis=1)
    )


def build_next_film(
    model: Any,
    data: FederatedData,
    *,
    num_items: int,
    length: int,
    width: int,
    layers: int,
    heads: int,
    framework: str = "torch",
    device: str = "cpu",
) -> tuple[Trainer, str]:
    """Build a trainer for a decoder of films, and describe the model in one line.

    The decoder is a small LLaMA: rotary positions, RMS norms, SwiGLU, and one table for inputs and outputs.

    Args:
        model: ``decoder``.
        data: data set that defines the task.
        num_items: number of films; film numbers start at 0.
        length: largest number of films of a sequence.
        width: width of the vector of a film, a multiple of twice the number of heads.
        layers: number of layers.
        heads: number of attention heads.
        framework: ``torch`` (default), ``jax`` or ``mixed``.
        device: device for the computation.

    Raises:
        SettingError: the model or the framework is unknown, or the width does not fit.
        MissingExtra: the framework, or transformers for torch, is not installed.
    """
    require(model == MODEL, "model", model, MODEL, f"model={MODEL}")
    fits = width % (2 * heads) == 0
    require(fits, "width", width, f"a multiple of {2 * heads}, twice the number of heads", f"width={32 * heads}")
    values = {
        "model_type": "llama",
        "vocab_size": num_items + 1,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": 2 * width,
        "max_position_embeddings": length,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    line = f"{MODEL}, {num_items} films, {layers} layers of width {width}"
    frameworks = ("torch", "jax") if framework == "mixed" else (framework,)
    trainers = [_trainer(name, values, device) for name in frameworks]
    return (MixedTrainer(trainers) if framework == "mixed" else trainers[0]), line


def _trainer(framework: str, values: Mapping[str, Any], device: str) -> Trainer:
    modules, trainers = load_family(framework, "recommendation")
    options = {"task": NEXT_FILM, "device": device, "initial": default_initial_parameters}
    if framework == "torch":
        trainer: Trainer = trainers.TorchTrainer(modules.build_decoder(values), forward=modules.score_films, **options)
        return trainer
    trainer = trainers.JaxTrainer(modules.build_decoder(values), **options)
    return trainer
