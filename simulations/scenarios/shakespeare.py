"""What a role of Shakespeare's says next.

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
from fedlearn.data.partition import Partition, natural_partition
from fedlearn.errors import is_count, require
from fedlearn.loop.scenario import CharacterEncoding, Scenario
from simulations.datasets.shakespeare import read_roles
from simulations.models.text import build_language_model

# public: printable ASCII, the end of a line, and one for all else; 0 pads
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
    """Predict the next character. Each speaking role is a client; its first words train, its last words test.

    An example is a window of ``length`` characters, and tells its successor at each of them. The windows that test
    overlap by half: each character is predicted from the ``length / 2`` or more before it.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``lstm`` (LEAF's: two layers of 256), ``gru`` (one of 256), ``transformer`` (causal), or a module.
        partition: ``natural``: each role is a client; default: test share 0.2, the last part of each role.
        length: of a window, even, >= 2; LEAF's is 80.
        min_characters: roles that say less are left out, >= 2.
        test_windows: that many of a role's, spread over its last part, >= 1; None takes all.
        path: a folder with the plays, or with the roles in one file; None searches for the plays.
        device: where to compute.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data cannot be had.

    Reference: Caldas et al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097.
    """
    partition = natural_partition("shakespeare", partition, test_share=0.2)
    share = partition.held_out_share
    even = is_count(length) and length % 2 == 0
    require(even, "length", length, "an even number >= 2", "length=80")
    least = is_count(min_characters, at_least=2)
    require(least, "min_characters", min_characters, "a whole number >= 2", "min_characters=500")
    require(share > 0, "partition.test_share", share, "a share in (0, 1)", "partition.test_share=0.2")
    some = test_windows is None or is_count(test_windows)
    require(some, "test_windows", test_windows, "null, or a whole number >= 1", "test_windows=2")
    texts, place = read_roles(path=path)
    texts = {role: text for role, text in texts.items() if len(text) >= min_characters}
    data = data_from_texts(texts, length=length, test_share=share, num_test_windows=test_windows, source=place)
    fitted, line = build_language_model(
        model, data, vocab_size=VOCAB_SIZE, length=length, framework=framework, device=device
    )
    files = {"characters.txt": ALPHABET}
    return Scenario(
        name="shakespeare",
        data=data,
        trainer=fitted,
        model=line,
        partition="natural",
        files=files,
        characters=CharacterEncoding(alphabet=ALPHABET, length=length),
    )


def data_from_texts(
    texts: dict[str, str], *, length: int, test_share: float, num_test_windows: int | None, source: str
) -> FederatedData:
    """One client for each text, in windows."""
    train, test = [], []
    for text in texts.values():
        tokens_T = encode(f"\n{text}")  # what stands before the first character
        split = 1 + round((1 - test_share) * len(text))
        train.append(_windows(tokens_T[:split], range(0, split - 1, length), length))
        starts = range(split - 1, len(text), length // 2)
        chosen = np.unique(np.linspace(0, len(starts) - 1, num_test_windows or len(starts)).round().astype(int))
        test.append(_tests(tokens_T, [starts[k] for k in chosen if len(starts)], length))
    return FederatedData(
        task="multiclass",
        clients=range(len(texts)),
        train=_laid_out(train).__getitem__,
        test=_laid_out(test).__getitem__,
        num_classes=VOCAB_SIZE,
        names=dict(enumerate(texts)),
        source=f"Shakespeare's plays, from {source}",
    )


def encode(text: str) -> np.ndarray:
    """``(T,)`` int32 numbers from 1.

    >>> encode("a b").tolist()
    [67, 2, 68]
    """
    return CharacterEncoding(alphabet=ALPHABET, length=0).encode(text)


def _windows(tokens_T: np.ndarray, starts: Sequence[int], length: int) -> Examples:
    """Windows that begin there, and the character after each of theirs; -1 behind the last."""
    long_T = np.concatenate([tokens_T, np.zeros(length, np.int32)])
    at_NT = np.asarray(starts, np.int64)[:, None] + np.arange(length)
    y_NT = long_T[at_NT + 1]
    return Examples(np.where(y_NT > 0, long_T[at_NT], 0), np.where(y_NT > 0, y_NT, -1).astype(np.int64))


def _tests(tokens_T: np.ndarray, starts: Sequence[int], length: int) -> Examples:
    """Windows whose second halves begin there, which alone count."""
    half = length // 2
    early_T = np.concatenate([np.zeros(half, np.int32), tokens_T])
    found = _windows(early_T, starts, length)
    found.y[:, :half] = -1
    return found


def _laid_out(parts: Sequence[Examples]) -> list[Examples]:
    # in one piece, so that asking for a client is a view
    x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    return [Examples(x[start:end], y[start:end]) for start, end in pairwise(ends)]
