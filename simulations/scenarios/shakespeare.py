"""The scenario `shakespeare`: predict the next character of a role in Shakespeare's plays.

Shapes: N windows, T characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import Examples
from fedlearn.data.inputs import CharacterInputs
from fedlearn.data.partition import Partition, natural_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.text_tokenizers import CharacterEncoding
from fedlearn.errors import is_count, require
from fedlearn.loop.scenario import Network, Scenario
from simulations.datasets.shakespeare import read_roles
from simulations.models.text import build_language_model

# public: printable ASCII, the line break, and one character for all others; 0 is padding
ALPHABET = "\n" + "".join(map(chr, range(32, 127))) + "�"
VOCAB_SIZE = len(ALPHABET) + 1


def shakespeare(
    *,
    framework: str = "torch",
    model: Any = "gru",
    partition: Partition | str = "natural",
    length: int = 80,
    min_characters: int = 500,
    test_windows: int | None = 2,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Predict the next character. Each speaking role is a client; its last words are the test set.

    An example is a window of ``length`` characters; the target at each position is the next character. Test windows
    overlap by half, so each character is predicted from at least ``length / 2`` characters before it.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``lstm`` (two layers of 256 units, as in LEAF), ``gru`` (one layer of 256), ``transformer`` (causal), or
            a module.
        partition: ``natural``: each role is a client; default: test share 0.2, the end of each role.
        length: characters per window, even, >= 2; LEAF uses 80.
        min_characters: minimum length of a role, >= 2; shorter roles are left out.
        test_windows: test windows per role, evenly spread, >= 1; None takes all.
        path: folder with the plays, or with the roles in one file; None searches for the plays.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: Caldas et al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097.
    """
    partition = natural_partition("shakespeare", partition, test_share=0.2)
    share = partition.held_out_share
    is_even = is_count(length) and length % 2 == 0
    require(is_even, "length", length, "an even number >= 2", "length=80")
    is_long = is_count(min_characters, at_least=2)
    require(is_long, "min_characters", min_characters, "a whole number >= 2", "min_characters=500")
    require(share > 0, "partition.test_share", share, "a share in (0, 1)", "partition.test_share=0.2")
    is_valid = test_windows is None or is_count(test_windows)
    require(is_valid, "test_windows", test_windows, "null, or a whole number >= 1", "test_windows=2")
    texts, place = read_roles(path=path)
    texts = {role: text for role, text in texts.items() if len(text) >= min_characters}
    data = data_from_texts(texts, length=length, test_share=share, num_test_windows=test_windows, source=place)
    fitted, line = build_language_model(
        model, data, vocab_size=VOCAB_SIZE, length=length, framework=framework, device=device
    )
    inputs = CharacterInputs(encoding=CharacterEncoding(alphabet=ALPHABET, length=length))
    target = Target(name="next character", task="multiclass", classes=("padding", *ALPHABET))
    arguments = {"vocab_size": VOCAB_SIZE, "length": length}
    return Scenario(
        name="shakespeare",
        data=data,
        trainer=fitted,
        model=line,
        partition="natural",
        preprocessing=Preprocessing(inputs=inputs, target=target),
        network=Network(builder="simulations.models.text.build_language_model", arguments=arguments),
    )


def data_from_texts(
    texts: dict[str, str], *, length: int, test_share: float, num_test_windows: int | None, source: str
) -> FederatedData:
    """Build one client per text, with its windows."""
    train, test = [], []
    for text in texts.values():
        tokens_T = encode(f"\n{text}")  # so the first character is predicted too
        split = 1 + round((1 - test_share) * len(text))
        train.append(_windows(tokens_T[:split], range(0, split - 1, length), length))
        starts = range(split - 1, len(text), length // 2)
        chosen = np.unique(np.linspace(0, len(starts) - 1, num_test_windows or len(starts)).round().astype(int))
        test.append(_test_windows(tokens_T, [starts[k] for k in chosen if len(starts)], length))
    return FederatedData(
        task="multiclass",
        clients=range(len(texts)),
        train=_contiguous(train).__getitem__,
        test=_contiguous(test).__getitem__,
        num_classes=VOCAB_SIZE,
        names=dict(enumerate(texts)),
        source=f"Shakespeare's plays, from {source}",
    )


def encode(text: str) -> np.ndarray:
    """Return the numbers of the characters, ``(T,)`` int32 from 1.

    >>> encode("a b").tolist()
    [67, 2, 68]
    """
    return CharacterEncoding(alphabet=ALPHABET, length=0).encode(text)


def _windows(tokens_T: np.ndarray, starts: Sequence[int], length: int) -> Examples:
    """Return the windows that begin at these positions, and the next characters as targets; -1 after the end."""
    padded_T = np.concatenate([tokens_T, np.zeros(length, np.int32)])
    at_NT = np.asarray(starts, np.int64)[:, None] + np.arange(length)
    y_NT = padded_T[at_NT + 1]
    return Examples(np.where(y_NT > 0, padded_T[at_NT], 0), np.where(y_NT > 0, y_NT, -1).astype(np.int64))


def _test_windows(tokens_T: np.ndarray, starts: Sequence[int], length: int) -> Examples:
    """Return windows whose second halves begin at these positions. Only the second halves are evaluated."""
    half = length // 2
    shifted_T = np.concatenate([np.zeros(half, np.int32), tokens_T])
    windows = _windows(shifted_T, starts, length)
    windows.y[:, :half] = -1
    return windows


def _contiguous(parts: Sequence[Examples]) -> list[Examples]:
    """Copy the examples of all clients into one array. Each client is then a view of it."""
    x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    return [Examples(x[start:end], y[start:end]) for start, end in pairwise(ends)]
