"""The scenario `sent140`: predict whether the author of a tweet is happy.

Shapes: N tweets, T words.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np

from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Examples
from fedlearn.data.from_arrays import from_rows, split_rows
from fedlearn.data.partition import Partition, natural_partition
from fedlearn.errors import is_number, require
from fedlearn.loop.scenario import Scenario
from simulations.datasets.hashing_tokenizer import read_lines
from simulations.datasets.sent140 import read_tweets
from simulations.models.text.readers import build_text_pipeline


def sent140(
    *,
    framework: str = "torch",
    model: Any = "cnn",
    partition: Partition | str = "natural",
    num_tokens: int = 8192,
    length: int = 40,
    held_out_users: float = 0.2,
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Classify the sentiment of tweets: 16,025 tweets of 2,875 users; some users only test.

    The users who train are the clients. The accuracy is that on all tweets of the others, whom no client knows.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``cnn``, ``bilstm``, ``transformer``, or a module with one output; ``minilm``: adapters of a
            pretrained encoder, which reads word pieces (see `simulations.scenarios.sst2`).
        partition: ``natural``: each user is a client; default: test share 0.1, for client metrics.
        num_tokens: numbers for words, >= 2; ``minilm`` has its own.
        length: words of a tweet that are read, >= 1.
        held_out_users: share of users who only test, in (0, 1).
        seed: of the choice of users and of the split.
        path: a folder with the tweets; None searches for them.
        device: where to compute.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data cannot be had: nobody offers them by user, so that they must lie in the cache, in
            ``FEDLEARN_DATA`` or at ``path``.

    Reference: Caldas et al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097.
    """
    partition = natural_partition("sent140", partition, test_share=0.1)
    share = is_number(held_out_users, at_least=0, below=1) and held_out_users > 0
    require(share, "held_out_users", held_out_users, "a share in (0, 1)", "held_out_users=0.2")
    words, fitted = build_text_pipeline(model, length=length, vocab_size=num_tokens, framework=framework, device=device)
    texts, happy_N, user_N, place = read_tweets(path=path)
    tokens_NT = words.encode(texts)
    users = generator(seed, Purpose.SPLIT).permutation(user_N.max() + 1)
    testing, training = np.split(users, [round(held_out_users * len(users))])
    of_users = [np.flatnonzero(user_N == user) for user in np.sort(training)]
    train, test = split_rows(of_users, happy_N, test_share=partition.held_out_share, seed=seed)
    data = from_rows(tokens_NT, happy_N, train=train, test=test, task="binary")
    tests_N = np.isin(user_N, testing)
    held_out = Examples(tokens_NT[tests_N].astype(np.float32), happy_N[tests_N])  # the dtype of clients
    data = replace(data, pooled_test=lambda: held_out, source=f"Sent140 by user, from {place}")
    trainer, line = fitted(data)
    return Scenario(
        name="sent140",
        data=data,
        trainer=trainer,
        model=line,
        read_inputs=lambda file: words.encode(read_lines(file)),
        files={words.file_name: words.to_json()},
    )
