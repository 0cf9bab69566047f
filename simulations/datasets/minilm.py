"""Load MiniLM, a small pretrained encoder of English sentences, and its word pieces.

Shapes: N texts, T tokens, E width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from fedlearn.data.download import find
from fedlearn.data.pretrained_files import MINILM
from fedlearn.data.text_tokenizers import WordPieceTokenizer
from fedlearn.errors import is_count, require
from simulations.models.encoder import EncoderConfig, PretrainedEncoder

MAX_POSITIONS = 512  # number of position embeddings
PARAMETER_NAMES = {  # name in the file: name in our model
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "mix",
    "attention.output.LayerNorm": "norm_0",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm_1",
}


def load_minilm(
    *, length: int, path: str | PathLike[str] | None = None
) -> tuple[PretrainedEncoder, WordPieceTokenizer, str]:
    """Load the encoder and its tokenizer.

    Args:
        length: number of tokens of a text, in 3..512, including the two special tokens.
        path: folder with the files of MiniLM; None searches for them.

    Returns:
        Encoder, tokenizer, and source of the files.

    Raises:
        SettingError: The length is out of range.
        DataError: The files are not available.

    References: Wang, Wei, Dong, Bao, Yang, Zhou, *MiniLM: Deep Self-Attention Distillation*, NeurIPS 2020,
    arXiv:2002.10957; Reimers, Gurevych, *Sentence-BERT*, EMNLP 2019, arXiv:1908.10084.
    """
    fits = is_count(length, at_least=3) and length <= MAX_POSITIONS
    require(fits, "length", length, f"a whole number in 3..{MAX_POSITIONS}", "length=40")
    location = find(MINILM, path=path)
    sizes_json = json.loads(location.files["config.json"].read_text(encoding="utf-8"))
    pieces = WordPieceTokenizer(
        tokenizer_json=location.files["tokenizer.json"].read_text(encoding="utf-8"), length=length
    )
    sizes = EncoderConfig(
        vocab_size=sizes_json["vocab_size"],
        length=length,
        width=sizes_json["hidden_size"],
        num_heads=sizes_json["num_attention_heads"],
        num_layers=sizes_json["num_hidden_layers"],
        hidden=sizes_json["intermediate_size"],
        epsilon=sizes_json["layer_norm_eps"],
    )
    return (
        PretrainedEncoder(
            name="minilm", config=sizes, weights=load_weights(location.files["model.safetensors"], sizes)
        ),
        pieces,
        location.place,
    )


def load_weights(file: Path, sizes: EncoderConfig) -> Mapping[str, np.ndarray]:
    """Load the parameters of BERT's encoder, under the names of our model.

    BERT distinguishes two parts of a text. Here all tokens belong to the first part, so its vector is added to the
    position embeddings.
    """
    weights = load_file(file)
    names = {
        f"encoder.layer.{layer}.{theirs}": f"layer_{layer}.{ours}"
        for layer in range(sizes.num_layers)
        for theirs, ours in PARAMETER_NAMES.items()
    }
    names["embeddings.LayerNorm"] = "norm"
    layers = {
        f"{ours}.{part}": weights[f"{theirs}.{part}"] for theirs, ours in names.items() for part in ("weight", "bias")
    }
    positions_TE = weights["embeddings.position_embeddings.weight"][: sizes.length]
    positions_TE = positions_TE + weights["embeddings.token_type_embeddings.weight"][0]
    return {
        **layers,
        "token_embedding.weight": weights["embeddings.word_embeddings.weight"],
        "position_embedding.weight": positions_TE,
    }
