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
from fedlearn.data.from_arrays import as_inputs, from_rows, split_rows
from fedlearn.data.inputs import TextInputs
from fedlearn.data.partition import Partition, natural_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.errors import is_number, require
from fedlearn.loop.scenario import Scenario
from simulations.datasets.sent140 import read_tweets
from simulations.models.text.readers import build_text_pipeline, digest_of_base, text_network

TARGET = Target(name="sentiment", task="binary", classes=("unhappy", "happy"))


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
    """Classify the sentiment of tweets: 16,025 tweets of 2,875 users.

    Some users are held out: they do not train, and the accuracy is measured on all their tweets. The other users are
    the clients.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``cnn``, ``bilstm``, ``lstm``, ``gru`` or ``transformer``; settings of a pretrained model, as
            ``model=minilm``, which reads its subwords; or a module with one output.
        partition: ``natural``: each user is a client; default: test share 0.1, for client metrics.
        num_tokens: vocabulary size, >= 2; a pretrained model ignores it.
        length: number of words read per tweet, >= 1.
        held_out_users: share of users that are held out, in (0, 1).
        seed: seed of the held-out users and of the test split.
        path: folder with the tweets; None searches for them.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing. There is no download with users, so put them into the cache, into
            ``FEDLEARN_DATA`` or at ``path``.

    Reference: Caldas et al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097.
    """
    partition = natural_partition("sent140", partition, test_share=0.1)
    is_share = is_number(held_out_users, at_least=0, below=1) and held_out_users > 0
    require(is_share, "held_out_users", held_out_users, "a share in (0, 1)", "held_out_users=0.2")
    words, fitted = build_text_pipeline(model, length=length, vocab_size=num_tokens, framework=framework, device=device)
    texts, happy_N, user_N, place = read_tweets(path=path)
    inputs = TextInputs(tokenizer=words)
    tokens_NT = inputs.transform(texts)
    users = generator(seed, Purpose.SPLIT).permutation(user_N.max() + 1)
    testing, training = np.split(users, [round(held_out_users * len(users))])
    rows_of_users = [np.flatnonzero(user_N == user) for user in np.sort(training)]
    train, test = split_rows(rows_of_users, happy_N, test_share=partition.held_out_share, seed=seed)
    data = from_rows(tokens_NT, happy_N, train=train, test=test, task="binary")
    is_test_N = np.isin(user_N, testing)
    held_out = Examples(as_inputs(tokens_NT[is_test_N]), happy_N[is_test_N])
    data = replace(data, pooled_test=lambda: held_out, source=f"Sent140 by user, from {place}")
    trainer, line = fitted(data)
    return Scenario(
        name="sent140",
        data=data,
        trainer=trainer,
        model=line,
        preprocessing=Preprocessing(inputs=inputs, target=TARGET),
        network=text_network(model, length=length, vocab_size=num_tokens),
        base_digest=digest_of_base(model),
    )
