"""Encoders: BERT, RoBERTa and DistilBERT, with a head for texts or for tokens.

Shapes: B batch, T positions, E width, C outputs.

References: Devlin et al., *BERT*, NAACL 2019, arXiv:1810.04805; Liu et al., *RoBERTa*, 2019, arXiv:1907.11692; Sanh et
al., *DistilBERT*, 2019, arXiv:1910.01108; Wang et al., *MiniLM*, NeurIPS 2020, arXiv:2002.10957 (a BERT).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedlearn.trainers.jax.pretrained.config import ModelConfig
from fedlearn.trainers.jax.pretrained.layers import ACTIVATIONS, ForwardPass, attend, heads
from fedlearn.trainers.pretrained import TOKENS

_BERT = {
    "layer": "encoder.layer",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mix": "attention.output.dense",
    "norm_0": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm_1": "output.LayerNorm",
}
_DISTIL = {
    "layer": "transformer.layer",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "mix": "attention.out_lin",
    "norm_0": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "norm_1": "output_layer_norm",
}
NAMES: Mapping[str, Mapping[str, str]] = {"bert": _BERT, "roberta": _BERT, "distilbert": _DISTIL}


def affine_shapes(config: ModelConfig, task: str, num_outputs: int) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of each affine layer, by name. Layers of the head have no prefix."""
    names, width, hidden = NAMES[config.kind], config.width, config.hidden
    square = dict.fromkeys(("query", "key", "value", "mix"), (width, width))
    sizes = {**square, "up": (hidden, width), "down": (width, hidden)}
    layers = {
        f"{config.kind}.{names['layer']}.{layer}.{names[part]}": size
        for layer in range(config.num_layers)
        for part, size in sizes.items()
    }
    return {**layers, **_head_shapes(config, task, num_outputs)}


def _head_shapes(config: ModelConfig, task: str, num_outputs: int) -> dict[str, tuple[int, int]]:
    width = config.width
    if task == TOKENS:
        return {"classifier": (num_outputs, width)}
    if config.kind == "roberta":
        return {"classifier.dense": (width, width), "classifier.out_proj": (num_outputs, width)}
    pool = "bert.pooler.dense" if config.kind == "bert" else "pre_classifier"
    return {pool: (width, width), "classifier": (num_outputs, width)}


def shapes(config: ModelConfig, task: str, num_outputs: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, by their names in transformers."""
    kind, names, width = config.kind, NAMES[config.kind], config.width
    affine = affine_shapes(config, task, num_outputs)
    norms = [f"{kind}.embeddings.LayerNorm"]
    norms += [
        f"{kind}.{names['layer']}.{n}.{names[norm]}" for n in range(config.num_layers) for norm in ("norm_0", "norm_1")
    ]
    tables = {"word": config.vocab_size, "position": config.num_positions, "token_type": config.num_token_types}
    return {
        **{f"{kind}.embeddings.{table}_embeddings.weight": (rows, width) for table, rows in tables.items() if rows},
        **{f"{name}.weight": shape for name, shape in affine.items()},
        **{f"{name}.bias": shape[:1] for name, shape in affine.items()},
        **{f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")},
    }


def run(config: ModelConfig, task: str, run_pass: ForwardPass, inputs: Mapping[str, Any]) -> jax.Array:
    """Return the logits: ``(B, C)`` for texts, ``(B, T, C)`` for tokens.

    Args:
        config: sizes of the model.
        task: name of the task; ``token_classification`` has a head for tokens, all others a head for texts.
        run_pass: parameters of the pass.
        inputs: ``input_ids``, and optionally ``attention_mask`` and ``token_type_ids``, all ``(B, T)``.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    allowed = jnp.ones((1, 1, ids.shape[1]), bool) if mask is None else (mask != 0)[:, None, :]
    x_BTE = _embed(config, run_pass, ids, inputs.get("token_type_ids"))
    for layer in range(config.num_layers):
        x_BTE = _layer(config, run_pass, f"{config.kind}.{NAMES[config.kind]['layer']}.{layer}", x_BTE, allowed)
    return _head(config, task, run_pass, x_BTE)


def _embed(config: ModelConfig, run_pass: ForwardPass, ids: jax.Array, types: jax.Array | None) -> jax.Array:
    prefix = f"{config.kind}.embeddings"
    x_BTE = run_pass.embed(f"{prefix}.word_embeddings", ids, pad=config.pad_token)
    if config.num_token_types:
        types = jnp.zeros_like(ids) if types is None else types
        x_BTE = x_BTE + run_pass.embed(f"{prefix}.token_type_embeddings", types)
    no_position = config.pad_token if config.kind == "roberta" else None
    x_BTE = x_BTE + run_pass.embed(f"{prefix}.position_embeddings", _positions(config, ids), pad=no_position)
    return run_pass.layer_norm(f"{prefix}.LayerNorm", x_BTE, config.epsilon)


def _positions(config: ModelConfig, ids: jax.Array) -> jax.Array:
    """Return the positions of the tokens. RoBERTa counts from its padding token, and does not count padding."""
    if config.kind != "roberta":
        return jnp.arange(ids.shape[1])[None]
    real = jnp.not_equal(ids, config.pad_token or 0).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + (config.pad_token or 0)


def _layer(config: ModelConfig, run_pass: ForwardPass, prefix: str, x_BTE: jax.Array, allowed: jax.Array) -> jax.Array:
    names = {part: f"{prefix}.{name}" for part, name in NAMES[config.kind].items()}
    query, key, value = (
        heads(run_pass.linear(names[part], x_BTE), config.head_width) for part in ("query", "key", "value")
    )
    mixed_BTE = run_pass.linear(names["mix"], attend(query, key, value, allowed))
    x_BTE = run_pass.layer_norm(names["norm_0"], x_BTE + mixed_BTE, config.epsilon)
    up_BTE = ACTIVATIONS[config.activation](run_pass.linear(names["up"], x_BTE))
    return run_pass.layer_norm(names["norm_1"], x_BTE + run_pass.linear(names["down"], up_BTE), config.epsilon)


def _head(config: ModelConfig, task: str, run_pass: ForwardPass, x_BTE: jax.Array) -> jax.Array:
    drop, rate = run_pass.dropout, run_pass.head_dropout
    if task == TOKENS:
        # DistilBERT has no dropout rate for a head of tokens
        return run_pass.linear("classifier", x_BTE if config.kind == "distilbert" else drop(x_BTE, rate))
    first_BE = x_BTE[:, 0]
    if config.kind == "bert":
        pooled_BE = jnp.tanh(run_pass.linear("bert.pooler.dense", first_BE))
    elif config.kind == "distilbert":
        pooled_BE = jax.nn.relu(run_pass.linear("pre_classifier", first_BE))
    else:
        pooled_BE = jnp.tanh(run_pass.linear("classifier.dense", drop(first_BE, rate)))
    last = "classifier.out_proj" if config.kind == "roberta" else "classifier"
    return run_pass.linear(last, drop(pooled_BE, rate))
