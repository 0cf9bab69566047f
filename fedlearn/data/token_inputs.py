"""Turn the tokens of sentences into numbers by hashing, for a tag per token.

Shapes: N sentences, T tokens.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlearn.errors import DataError, is_count, require


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """Turn sentences of tokens into token numbers. The number of a token is its hash, and 0 is padding.

    The numbers are public and equal at every node, and no statistics of the sentences are needed. Upper case and digits
    change the number of a token.

    Args:
        vocab_size: number of tokens, >= 2; tokens have numbers in 1..vocab_size - 1.
        length: number of tokens of a sentence, >= 1; shorter sentences are padded with 0.

    >>> x_NT = TokenInputs(length=4).transform([["I", "see", "I"]])
    >>> bool(x_NT[0, 0] == x_NT[0, 2] != x_NT[0, 1]), int(x_NT[0, 3])
    (True, 0)
    """

    vocab_size: int = 8192
    length: int = 128
    kind: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        require(is_count(self.length), "text_length", self.length, "a whole number >= 1", "scenario.text_length=128")
        if not is_count(self.vocab_size, at_least=2) or self.vocab_size > 2**24:
            raise ValueError("a wrong number of tokens")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input, without the batch axis."""
        return (self.length,)

    def transform(self, sentences: Sequence[Sequence[str]], *, cut: bool = False) -> np.ndarray:
        """Return the model inputs ``(N, T)`` int32.

        Args:
            sentences: tokens of each sentence.
            cut: whether longer sentences are cut. If not, they are an error.

        Raises:
            DataError: a sentence is longer than ``length``.
        """
        x_NT = np.zeros((len(sentences), self.length), np.int32)
        for number, (row_T, tokens) in enumerate(zip(x_NT, sentences, strict=True), start=1):
            if len(tokens) > self.length and not cut:
                raise DataError(
                    f"sentence {number} has {len(tokens)} tokens\n  expected  at most {self.length}, the length of the "
                    "model inputs\n  advice    two shorter sentences"
                )
            row_T[: len(tokens)] = [self._number(token) for token in tokens[: self.length]]
        return x_NT

    def _number(self, token: str) -> int:
        return 1 + zlib.crc32(unicodedata.normalize("NFC", token).encode("utf-8", "replace")) % (self.vocab_size - 1)


def are_sentences(data: Any) -> bool:
    """Return whether data are sentences: lists of tokens.

    >>> are_sentences([["I", "see"]]), are_sentences(["I", "see"])
    (True, False)
    """
    return isinstance(data, list | tuple) and all(
        isinstance(tokens, list | tuple) and all(isinstance(token, str) for token in tokens) for tokens in data
    )


def without_padding(labels_NT: np.ndarray, x_NT: np.ndarray) -> np.ndarray:
    """Return the labels of the tokens of each sentence as a list, ``(N,)``.

    Args:
        labels_NT: label of each position.
        x_NT: token numbers; 0 is padding.
    """
    tags_N = np.empty(len(labels_NT), object)
    for number, (row_T, count) in enumerate(zip(labels_NT, (x_NT > 0).sum(axis=1), strict=True)):
        tags_N[number] = row_T[:count].tolist()
    return tags_N
