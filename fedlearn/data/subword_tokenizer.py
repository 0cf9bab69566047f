"""Turn texts into the subwords of a pretrained model.

Shapes: N texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedlearn.core.inputs import join_inputs
from fedlearn.errors import DataError, MissingExtra, is_count, require

IDS, MASK, LABELS, POSITIONS = "input_ids", "attention_mask", "labels", "token_positions"  # fields of model inputs
IGNORED = -100  # label of a token that does not count in the loss, as in transformers


@dataclass(frozen=True, kw_only=True)
class SubwordTokenizer:
    """Tokenize texts with the tokenizer of a pretrained model.

    Args:
        tokenizer_json: content of a file of the tokenizers library; empty if only the files of the model have it, see
            `fedlearn.data.base_tokenizer`.
        length: number of tokens of a text with special tokens, >= 3. Longer texts are cut, and shorter ones are padded
            at the end.
        pad_id: number of the token for padding. The mask distinguishes it from a token of a text.
    """

    tokenizer_json: str
    length: int
    pad_id: int = 0
    kind: ClassVar[str] = "subwords"

    def __post_init__(self) -> None:
        require(is_count(self.length, at_least=3), "length", self.length, "a whole number >= 3", "length=128")
        if not isinstance(self.tokenizer_json, str) or not is_count(self.pad_id, at_least=0):
            raise ValueError("a wrong tokenizer")

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the model inputs ``(N,)`` with the fields ``input_ids`` and ``attention_mask``, ``(N, T)`` int32.

        Raises:
            MissingExtra: The library tokenizers is not installed.
        """
        return self.inputs_of([encoding.ids for encoding in self.encodings(texts)])

    def encode_tokens(self, tokens: Sequence[str]) -> Any:
        """Return the encoding of a sentence that is divided into tokens, cut to ``length``."""
        return _tokenizer(self.tokenizer_json, self.length).encode(list(tokens), is_pretokenized=True)

    def ids(self, text: str) -> list[int]:
        """Return the token numbers of a text, without special tokens at its ends and without a cut."""
        return list(_tokenizer(self.tokenizer_json, None).encode(text, add_special_tokens=False).ids) if text else []

    def count_cut(self, texts: Sequence[str]) -> int:
        """Return the number of texts that are longer than ``length``."""
        return sum(bool(encoding.overflowing) for encoding in self.encodings(texts))

    def encodings(self, texts: Sequence[str]) -> list[Any]:
        """Return the encodings of the tokenizers library, cut to ``length``."""
        return list(_tokenizer(self.tokenizer_json, self.length).encode_batch(list(texts)))

    def inputs_of(self, ids: Sequence[Sequence[int]], **others: np.ndarray) -> np.ndarray:
        """Return the model inputs of token numbers, with further fields."""
        ids_NT = np.full((len(ids), self.length), self.pad_id, np.int32)
        mask_NT = np.zeros((len(ids), self.length), np.int32)
        for row, tokens in enumerate(ids):
            ids_NT[row, : len(tokens)] = tokens
            mask_NT[row, : len(tokens)] = 1
        return join_inputs({IDS: ids_NT, MASK: mask_NT, **others})

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token numbers, without special tokens."""
        return str(_tokenizer(self.tokenizer_json, self.length).decode([int(token) for token in ids]))


@lru_cache(maxsize=8)
def _tokenizer(tokenizer_json: str, length: int | None) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtra("the model", "text") from error
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"the tokenizer cannot be read: {str(error)[:200]}\n  advice    download it again") from error
    tokenizer.no_truncation()
    if length is not None:
        tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=8)
def tokenizer_of_template(tokenizer_json: str, chat_template: str, bos: str, eos: str) -> Any:
    """Return a tokenizer of transformers that renders chats with a template."""
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingExtra("a chat template", "hf") from error
    tokens = {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token}
    inner = _tokenizer(tokenizer_json, None)
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat_template, **tokens)


def load_tokenizer(folder: Path, *, length: int) -> SubwordTokenizer:
    """Return the tokenizer of a pretrained model.

    Args:
        folder: folder of the model.
        length: see `SubwordTokenizer`; at most the number of positions of the model.

    Raises:
        DataError: the folder has no fast tokenizer.
        MissingExtra: the library transformers is needed and not installed.
    """
    original = auto_tokenizer(folder)
    pad_id = original.pad_token_id
    if pad_id is None:  # GPT and LLaMA have no token for padding; the mask hides it
        pad_id = original.eos_token_id if original.eos_token_id is not None else 0
    return SubwordTokenizer(tokenizer_json=original.backend_tokenizer.to_str(), length=length, pad_id=int(pad_id))


def auto_tokenizer(folder: Path) -> Any:
    """Return the fast tokenizer of transformers for a folder. No code of the folder runs.

    Raises:
        DataError: the folder has no fast tokenizer.
        MissingExtra: the library transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra(f"model.path={folder}", "hf") from error
    fix = "a folder with tokenizer.json, which save_pretrained of a fast tokenizer writes"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(f"model.path is {folder}: the folder has no tokenizer ({reason})\n  advice    {fix}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"model.path is {folder}: its tokenizer has no fast version\n  advice    {fix}")
    return tokenizer
