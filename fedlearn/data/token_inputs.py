"""Turn the tokens of sentences into numbers, by hashing or by the subwords of a pretrained model, for a tag per token.

Shapes: N sentences, T tokens.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlearn.core.inputs import has_fields
from fedlearn.data.subword_tokenizer import POSITIONS, SubwordTokenizer
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


@dataclass(frozen=True, kw_only=True)
class SubwordTokenInputs:
    """Turn sentences of tokens into the subwords of a pretrained model, with the place of the first subword of a token.

    Args:
        tokenizer: tokenizer of the model; its length bounds the subwords, and so the tokens.
    """

    tokenizer: SubwordTokenizer
    kind: ClassVar[str] = "subwords of tokens"

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, SubwordTokenizer):
            raise ValueError("a wrong tokenizer")

    @property
    def length(self) -> int:
        """Largest number of tokens of a sentence, T."""
        return self.tokenizer.length

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input, without the batch axis."""
        return (self.length,)

    def transform(self, sentences: Sequence[Sequence[str]], *, cut: bool = False) -> np.ndarray:
        """Return the model inputs ``(N,)`` with token numbers, mask and places, ``(N, T)`` int32 each.

        Args:
            sentences: tokens of each sentence.
            cut: whether the tokens after ``length`` subwords are cut. If not, they are an error. Their place is -1.

        Raises:
            DataError: a sentence is too long.
        """
        places_NT = np.full((len(sentences), self.length), -1, np.int32)
        ids = []
        for number, (row_T, tokens) in enumerate(zip(places_NT, sentences, strict=True), start=1):
            encoding = self.tokenizer.encode_tokens(tokens)
            ids.append(encoding.ids)
            first = _first_places(encoding.word_ids)
            num_read = 1 + max(first, default=-1)
            if num_read < len(tokens) and encoding.overflowing and not cut:
                raise DataError(
                    f"sentence {number} has more than {self.length} subwords\n  expected  at most {self.length}, the "
                    "length of the model inputs\n  advice    two shorter sentences"
                )
            num_read = num_read if encoding.overflowing else min(len(tokens), self.length)
            row_T[:num_read] = [first.get(place, 0) for place in range(num_read)]  # 0: a token without a subword
        return self.tokenizer.inputs_of(ids, **{POSITIONS: places_NT})


def _first_places(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Return the place of the first subword of each token."""
    places: dict[int, int] = {}
    for place, token in enumerate(word_ids):
        if token is not None:
            places.setdefault(token, place)
    return places


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
        x_NT: token numbers, where 0 is padding; or inputs with the places of tokens, where -1 is padding.
    """
    tags_N = np.empty(len(labels_NT), object)
    for number, (row_T, count) in enumerate(zip(labels_NT, are_tokens(x_NT).sum(axis=1), strict=True)):
        tags_N[number] = row_T[:count].tolist()
    return tags_N


def are_tokens(x_NT: np.ndarray) -> np.ndarray:
    """Return a mask of the tokens of each sentence, ``(N, T)``; the other places are padding or cut."""
    return np.asarray(x_NT[POSITIONS] >= 0 if has_fields(x_NT) else x_NT > 0)
