"""The scenario `sst2`: fine-tune a pretrained encoder to classify the sentiment of film reviews.

Shapes: N sentences, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

from fedlearn.core.records import Examples
from fedlearn.data.from_arrays import as_inputs, partition_arrays
from fedlearn.data.inputs import TextInputs
from fedlearn.data.partition import Partition, as_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.pretrained_files import MINILM
from fedlearn.loop.scenario import Scenario
from fedlearn.trainers.pretrained import PretrainedModel
from simulations.datasets.sst2 import read_reviews
from simulations.models.text.readers import build_text_pipeline, digest_of_base, text_network

DEFAULT_MODEL = PretrainedModel(path=MINILM.name, layers=3)  # as model=minilm
TARGET = Target(name="sentiment", task="binary", classes=("negative", "positive"))


def sst2(
    *,
    framework: str = "torch",
    model: Any = None,
    partition: Partition | str = "dirichlet",
    num_tokens: int = 8192,
    length: int = 40,
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Classify sentences of film reviews as positive or negative: 6,920 for training, 1,821 for the test.

    A pretrained encoder is fine-tuned. With ``model.adapter=lora`` its weights are frozen, and all clients share one
    copy in memory. Only adapters and head are trained and sent, so clipping, noise and codecs act on them alone.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: settings of a pretrained model, which reads its subwords; None is MiniLM with adapters in its last three
            layers. Or ``cnn``, ``bilstm``, ``lstm``, ``gru`` or ``transformer``, which read hashed words; or a module
            with one output.
        partition: a kind other than ``natural``; defaults: 10 clients, alpha 1, 1 class per client, test share 0.1.
        num_tokens: vocabulary size, >= 2; a pretrained model ignores it.
        length: number of tokens read per sentence, >= 3; 93 % of the sentences have at most 40 subwords of MiniLM.
        seed: seed of the partition and of the test split.
        path: folder with the sentences; None searches for them.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the sentences or the model are missing or damaged.

    Reference: Socher et al., *Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank*, EMNLP
    2013; Hu et al., *LoRA*, ICLR 2022, arXiv:2106.09685.
    """
    model = DEFAULT_MODEL if model is None else model
    partition = as_partition(partition, alpha=1.0, classes_per_client=1, test_share=0.1)
    tokens, fitted = build_text_pipeline(
        model, length=length, vocab_size=num_tokens, framework=framework, device=device
    )
    (texts, positive_N), (test_texts, test_positive), place = read_reviews(path=path)
    inputs = TextInputs(tokenizer=tokens)
    data = partition_arrays(inputs.transform(texts), positive_N, partition, task="binary", seed=seed)
    official = Examples(as_inputs(inputs.transform(test_texts)), test_positive)
    data = replace(data, pooled_test=lambda: official, source=f"SST-2 from {place}")
    trainer, line = fitted(data)
    return Scenario(
        name="sst2",
        data=data,
        trainer=trainer,
        model=line,
        partition=str(partition),
        preprocessing=Preprocessing(inputs=inputs, target=TARGET),
        network=text_network(model, length=length, vocab_size=num_tokens),
        base_digest=digest_of_base(model),
    )
