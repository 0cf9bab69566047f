"""The scenario `sst2`: fine-tune a pretrained encoder to classify the sentiment of film reviews.

Shapes: N sentences, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np

from fedlearn.core.records import Examples
from fedlearn.data.from_arrays import partition_arrays
from fedlearn.data.partition import Partition, as_partition
from fedlearn.loop.scenario import Scenario
from simulations.datasets.hashing_tokenizer import read_lines
from simulations.datasets.sst2 import read_reviews
from simulations.models.encoder import FineTuning
from simulations.models.text.readers import build_text_pipeline


def sst2(
    *,
    framework: str = "torch",
    model: Any = "minilm",
    partition: Partition | str = "dirichlet",
    tuning: str = "lora",
    layers: int = 3,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_on: Sequence[str] | None = None,
    dropout: float = 0.0,
    length: int = 40,
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    encoder: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Classify sentences of film reviews as positive or negative: 6,920 for training, 1,821 for the test.

    A pretrained encoder is tuned. With ``tuning=lora`` its own weights stay as they are, the same at every client and
    once in memory: what is trained, travels, and is clipped, noised and compressed are the adapters and the head.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``minilm``; ``cnn``, ``bilstm``, ``transformer``, which begin from nothing and read the same word pieces;
            or a module that takes ``(B, length)`` token numbers and has one output.
        partition: a kind other than ``natural``; defaults: 10 clients, alpha 1, 1 class per client, test share 0.1.
        tuning: of ``minilm``: ``lora``, or ``full``: the layers themselves.
        layers: of ``minilm``, from the top, that are tuned, in 0..6; with ``full`` all six are tuned with the
            embeddings, with 0 the head alone.
        lora_rank: of adapters, >= 1.
        lora_alpha: > 0; an adapter's output counts alpha / rank.
        lora_on: which affine maps have adapters, some of ``query``, ``key``, ``value``, ``mix``, ``up``, ``down``;
            None is the first and the third, as in the paper.
        dropout: of ``minilm``: share of what adapters and head read that is set to zero in training, in [0, 1).
        length: word pieces of a sentence that are read, in 3..512; 93 % of the sentences have no more than 40.
        seed: of partition and split.
        path: a folder with the sentences; None searches for them.
        encoder: a folder with MiniLM's files; None searches for them.
        device: where to compute.

    Raises:
        SettingError: a setting is out of range.
        DataError: the sentences or the encoder cannot be had.

    Reference: Socher et al., *Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank*, EMNLP
    2013; Hu et al., *LoRA*, ICLR 2022, arXiv:2106.09685.
    """
    partition = as_partition(partition, alpha=1.0, classes_per_client=1, test_share=0.1)
    projections = ("query", "value") if lora_on is None else lora_on
    tuned = FineTuning(
        kind=tuning, num_tuned_layers=layers, rank=lora_rank, alpha=lora_alpha, projections=projections, dropout=dropout
    )
    pieces, fitted = build_text_pipeline(
        model, length=length, tuning=tuned, encoder_path=encoder, framework=framework, device=device
    )
    (texts, positive_N), (test_texts, test_positive), place = read_reviews(path=path)
    tokens_NT = pieces.encode(texts)
    data = partition_arrays(tokens_NT, positive_N, partition, task="binary", seed=seed)
    official = Examples(pieces.encode(test_texts).astype(np.float32), test_positive)  # as clients have theirs
    data = replace(data, pooled_test=lambda: official, source=f"SST-2 from {place}")
    trainer, line = fitted(data)
    return Scenario(
        name="sst2",
        data=data,
        trainer=trainer,
        model=line,
        partition=str(partition),
        read_inputs=lambda file: pieces.encode(read_lines(file)),
        files={pieces.file_name: pieces.to_json()},
    )
