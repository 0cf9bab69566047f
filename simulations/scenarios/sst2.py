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
from fedlearn.data.inputs import TextInputs
from fedlearn.data.partition import Partition, as_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.loop.scenario import Scenario
from simulations.datasets.sst2 import read_reviews
from simulations.models.encoder import FineTuning
from simulations.models.text.readers import build_text_pipeline, text_network

TARGET = Target(name="sentiment", task="binary", classes=("negative", "positive"))


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

    A pretrained encoder is fine-tuned. With ``tuning=lora`` the weights of the encoder are frozen, and all clients
    share one copy in memory. Only adapters and head are trained and sent, so clipping, noise and codecs act on them
    alone.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``minilm``, or ``cnn``, ``bilstm`` or ``transformer``, which are not pretrained and read the same word
            pieces. Or a module that receives ``(B, length)`` token numbers and has one output.
        partition: a kind other than ``natural``; defaults: 10 clients, alpha 1, 1 class per client, test share 0.1.
        tuning: for ``minilm``: ``lora`` trains adapters, ``full`` trains the layers.
        layers: for ``minilm``: number of top layers to tune, in 0..6. 0 tunes the head alone; 6 with ``full`` also
            tunes the embeddings.
        lora_rank: rank of the adapters, >= 1.
        lora_alpha: scale of the adapters, > 0; their output is multiplied by alpha / rank.
        lora_on: affine maps with adapters, from ``query``, ``key``, ``value``, ``mix``, ``up``, ``down``; None is
            ``query`` and ``value``, as in the paper.
        dropout: for ``minilm``: dropout rate at the inputs of adapters and head, in [0, 1).
        length: number of word pieces read per sentence, in 3..512; 93 % of the sentences have at most 40.
        seed: seed of the partition and of the test split.
        path: folder with the sentences; None searches for them.
        encoder: folder with MiniLM's files; None searches for them.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the sentences or the encoder are missing or damaged.

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
    inputs = TextInputs(tokenizer=pieces)
    tokens_NT = inputs.transform(texts)
    data = partition_arrays(tokens_NT, positive_N, partition, task="binary", seed=seed)
    test_NT = inputs.transform(test_texts).astype(np.float32)  # same dtype as at clients
    official = Examples(test_NT, test_positive)
    data = replace(data, pooled_test=lambda: official, source=f"SST-2 from {place}")
    trainer, line = fitted(data)
    return Scenario(
        name="sst2",
        data=data,
        trainer=trainer,
        model=line,
        partition=str(partition),
        preprocessing=Preprocessing(inputs=inputs, target=TARGET),
        network=text_network(model, length=length, tuning=tuned, encoder_path=encoder),
    )
