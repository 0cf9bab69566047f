"""The scenario `airline_sentiment`: classify the sentiment of tweets to six airlines.

Shapes: N tweets, T words.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

from fedlearn.data.from_arrays import partition_arrays
from fedlearn.data.inputs import TextInputs
from fedlearn.data.partition import Natural, Partition, as_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.loop.scenario import Scenario
from simulations.datasets.airline_tweets import AIRLINES, SENTIMENTS, read_airline_tweets
from simulations.models.text.readers import build_text_pipeline, digest_of_base, text_network

TARGET = Target(name="sentiment", task="multiclass", classes=SENTIMENTS)


def airline_sentiment(
    *,
    framework: str = "torch",
    model: Any = "cnn",
    partition: Partition | str = "natural",
    num_tokens: int = 8192,
    length: int = 40,
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Classify tweets about airlines as negative, neutral or positive: 14,425 tweets, six airlines.

    With ``partition=natural`` the clients are the airlines of ``AIRLINES``. A tweet that names several airlines belongs
    to the first one, and duplicate tweets count once. Words are numbered by a hash (see `HashingTokenizer`).

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``cnn``, ``bilstm``, ``lstm``, ``gru`` or ``transformer``; settings of a pretrained model, as
            ``model=minilm``, which reads its subwords; or a module with three outputs.
        partition: ``natural`` (one client per airline) or another kind; defaults: 6 clients, 2 classes per client, test
            share 0.2.
        num_tokens: vocabulary size, >= 2; a pretrained model ignores it.
        length: number of words read per tweet, >= 1; 99 % of the tweets have at most 40.
        seed: seed of the partition and of the test split.
        path: folder with the corpus, or the file; None searches for it.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: Crowdflower, *Twitter US Airline Sentiment*, 2015.
    """
    words, fitted = build_text_pipeline(model, length=length, vocab_size=num_tokens, framework=framework, device=device)
    texts, sentiment_N, airline_N, place = read_airline_tweets(path=path)
    partition = as_partition(partition, num_clients=6, test_share=0.2)
    inputs = TextInputs(tokenizer=words)
    tokens_NT = inputs.transform(texts)
    data = partition_arrays(tokens_NT, sentiment_N, partition, task="multiclass", natural_N=airline_N, seed=seed)
    names = dict(enumerate(AIRLINES)) if isinstance(partition, Natural) else {}
    data = replace(data, names=names, source=f"tweets to US airlines, from {place}")
    trainer, line = fitted(data)
    return Scenario(
        name="airline_sentiment",
        data=data,
        trainer=trainer,
        model=line,
        partition=str(partition),
        preprocessing=Preprocessing(inputs=inputs, target=TARGET),
        network=text_network(model, length=length, vocab_size=num_tokens),
        base_digest=digest_of_base(model),
    )
