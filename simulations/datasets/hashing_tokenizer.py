"""From texts to numbers, without a vocabulary learned from anybody's texts.

Shapes: N texts, T tokens.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence as Several
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fedlearn.data.download import open_decompressed
from fedlearn.errors import DataError, MissingExtra, is_count, require

REPLACEMENTS = {r"https?://\S+": "url", r"\d+": "0"}  # what stands for many words at once


def read_lines(file: Path) -> list[str]:
    """The texts of a file, one a line.

    Raises:
        DataError: it is empty, cannot be read or is no UTF-8.
    """
    with open_decompressed(file) as raw:
        try:
            texts = [line for line in raw.read().decode("utf-8").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is no text: {error}\n  try       a file in UTF-8, a text a line") from error
    if not texts:
        raise DataError(f"{file} holds no texts\n  try       a file of texts, one a line")
    return texts


@dataclass(frozen=True, kw_only=True)
class HashingTokenizer:
    """Each word's number is a hash of it: public, the same at every node, and no text is counted to find it.

    Words are those of BERT's uncased normalisation and splitting (the tokenizers library); a link is one word, and so
    are all numbers. A token may stand for several words: with 8,191 of them and the 5,000 words that make up nearly all
    of a corpus, that costs little.

    All texts have one length, so that clients of a block lie in one array. Padding each client's to its own longest,
    rounded up to eight, would save nothing for six airlines (all have texts of 40 words or more), nor would it batch
    by batch (1 % of the positions of 32 tweets); for users of a few tweets it would save a fifth.

    Args:
        vocab_size: 0 pads, words have 1..vocab_size - 1; >= 2.
        length: a longer text is cut there, a shorter one padded with 0; >= 1.

    Reference: Weinberger, Dasgupta, Langford, Smola, Attenberg, *Feature Hashing for Large Scale Multitask Learning*,
    ICML 2009, arXiv:0902.2206.
    """

    vocab_size: int = 8192
    length: int = 40
    file_name = "hashing_tokenizer.json"  # where a run keeps it

    def __post_init__(self) -> None:
        at_least_two = is_count(self.vocab_size, at_least=2)
        require(at_least_two, "num_tokens", self.vocab_size, "a whole number >= 2", "num_tokens=8192")
        require(is_count(self.length), "length", self.length, "a whole number >= 1", "length=40")

    def encode(self, texts: Several[str]) -> np.ndarray:
        """``(N, T)`` int32.

        Raises:
            MissingExtra: tokenizers is not installed.
        """
        try:
            from tokenizers import Regex
            from tokenizers.normalizers import BertNormalizer, Replace, Sequence
            from tokenizers.pre_tokenizers import BertPreTokenizer
        except ImportError as error:
            raise MissingExtra("scenario", "text") from error
        marks = [Replace(Regex(pattern), mark) for pattern, mark in REPLACEMENTS.items()]
        normal, split = Sequence([*marks, BertNormalizer()]), BertPreTokenizer()
        tokens_NT = np.zeros((len(texts), self.length), np.int32)
        for row_T, text in zip(tokens_NT, texts, strict=True):
            words = split.pre_tokenize_str(normal.normalize_str(text))[: self.length]
            row_T[: len(words)] = [1 + zlib.crc32(word.encode()) % (self.vocab_size - 1) for word, _ in words]
        return tokens_NT

    def to_json(self) -> str:
        """What `from_json` reads: it lies beside a model, so that new texts can be numbered as it has learned them."""
        return json.dumps(
            {
                "kind": "hashed words",
                "hash": "crc32",
                "splitting": "bert uncased",
                "replacements": REPLACEMENTS,
                **asdict(self),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> HashingTokenizer:
        """From what `to_json` has written.

        >>> HashingTokenizer.from_json(HashingTokenizer(vocab_size=100, length=5).to_json())
        HashingTokenizer(vocab_size=100, length=5)
        """
        facts = json.loads(text)
        return cls(vocab_size=facts["vocab_size"], length=facts["length"])
