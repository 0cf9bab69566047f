"""Turn texts into numbers: hashed words, word pieces of a pretrained encoder, or characters.

Shapes: N texts, T tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedlearn.data.download import open_decompressed
from fedlearn.data.scripts import UNSPACED
from fedlearn.errors import DataError, MissingExtra, is_count, require

REPLACEMENTS = {r"https?://\S+": "url", r"\d+": "0"}  # all matches of a pattern become one word


def read_lines(file: Path) -> list[str]:
    """Read the texts of a file, one per line.

    Raises:
        DataError: The file is empty, not readable or not UTF-8.
    """
    with open_decompressed(file) as raw:
        try:
            texts = [line for line in raw.read().decode("utf-8").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8: {error}\n  advice    a UTF-8 file with one text per line") from error
    if not texts:
        raise DataError(f"{file} contains no text\n  advice    a UTF-8 file with one text per line")
    return texts


@dataclass(frozen=True, kw_only=True)
class HashingTokenizer:
    """Tokenize texts: the number of a word is its hash.

    The numbers are public and equal at every node, and no statistics of the texts are needed.

    Text is normalized and split into words as for BERT uncased, by the tokenizers library. In a script without spaces,
    such as Chinese, Japanese or Thai, each character is a word. All links become one word,
    and all numbers another. Several words may share one token number. This costs little: by default, words have 8,191
    numbers, and about 5,000 words make up nearly all of a corpus.

    All texts have one length, so that the clients of a block fit into one array. Shorter arrays per client or per
    batch would save little. All six airlines have texts of 40 words or more, so padding per client saves nothing.
    Padding per batch of 32 tweets saves 1 % of the positions. For users with few tweets, padding per client, rounded
    up to eight, would save a fifth.

    Args:
        vocab_size: number of tokens, >= 2, default 8192; 0 is padding, words have numbers in 1..vocab_size - 1.
        length: number of tokens of a text, >= 1, default 40; longer texts are cut, shorter ones are padded with 0.

    Reference: Weinberger, Dasgupta, Langford, Smola, Attenberg, *Feature Hashing for Large Scale Multitask Learning*,
    ICML 2009, arXiv:0902.2206.
    """

    vocab_size: int = 8192
    length: int = 40
    kind: ClassVar[str] = "hashed words, version 2"  # BERT uncased words, CRC-32, `REPLACEMENTS`

    def __post_init__(self) -> None:
        at_least_two = is_count(self.vocab_size, at_least=2)
        require(at_least_two, "num_tokens", self.vocab_size, "a whole number >= 2", "num_tokens=8192")
        require(is_count(self.length), "length", self.length, "a whole number >= 1", "length=40")

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the token numbers of the texts, ``(N, T)``, int32.

        Raises:
            MissingExtra: The library tokenizers is not installed.
        """
        try:
            from tokenizers import Regex, normalizers
            from tokenizers.pre_tokenizers import BertPreTokenizer, Split
            from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
        except ImportError as error:
            raise MissingExtra("scenario", "text") from error
        replacements = [normalizers.Replace(Regex(pattern), token) for pattern, token in REPLACEMENTS.items()]
        normalizer = normalizers.Sequence([*replacements, normalizers.BertNormalizer()])
        splitter = PreTokenizerSequence([Split(Regex(f"[{UNSPACED}]"), "isolated"), BertPreTokenizer()])
        tokens_NT = np.zeros((len(texts), self.length), np.int32)
        for row_T, text in zip(tokens_NT, texts, strict=True):
            words = splitter.pre_tokenize_str(normalizer.normalize_str(text))[: self.length]
            row_T[: len(words)] = [1 + zlib.crc32(word.encode()) % (self.vocab_size - 1) for word, _ in words]
        return tokens_NT


@dataclass(frozen=True, kw_only=True)
class CharacterEncoding:
    """Encode text for a model that predicts the next character.

    Args:
        alphabet: characters with the numbers 1, 2, ...; 0 is padding. Other characters get the last number.
        length: number of characters in one input of the model.

    >>> CharacterEncoding(alphabet="ab ", length=80).encode("ba!").tolist()
    [2, 1, 3]
    """

    alphabet: str
    length: int

    def encode(self, text: str) -> np.ndarray:
        """Return the numbers of the characters, ``(T,)`` int32, from 1."""
        numbers = {character: number for number, character in enumerate(self.alphabet, 1)}
        return np.array([numbers.get(character, len(self.alphabet)) for character in text], np.int32)
