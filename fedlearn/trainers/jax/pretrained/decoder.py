"""Decoders that predict the next token: GPT-2, and LLaMA with its relatives Mistral and Qwen2.

Shapes: B batch, T positions, S positions of keys, E width, V tokens.

References: Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019; Touvron et al., *LLaMA*, 2023,
arXiv:2302.13971; Ainslie et al., *GQA*, EMNLP 2023, arXiv:2305.13245; Shazeer, *GLU Variants*, 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedlearn.trainers.jax.pretrained.config import ModelConfig
from fedlearn.trainers.jax.pretrained.layers import ACTIVATIONS, Cache, ForwardPass, attend, heads, rotate


def affine_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of each affine layer, by name."""
    width, hidden = config.width, config.hidden
    if config.kind == "gpt2":
        sizes = {
            "attn.c_attn": (3 * width, width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (hidden, width),
            "mlp.c_proj": (width, hidden),
        }
    else:
        queries, groups = (count * config.head_width for count in (config.num_heads, config.num_key_value_heads))
        sizes = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (groups, width),
            "self_attn.v_proj": (groups, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }
    return {f"{_layer_name(config, n)}.{name}": size for n in range(config.num_layers) for name, size in sizes.items()}


def _layer_name(config: ModelConfig, layer: int) -> str:
    return f"transformer.h.{layer}" if config.kind == "gpt2" else f"model.layers.{layer}"


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, by their names in transformers. A tied output layer is no parameter."""
    width, vocab = config.width, (config.vocab_size, config.width)
    affine, is_gpt2 = affine_shapes(config), config.kind == "gpt2"
    weights = {f"{name}.weight": shape[::-1] if is_gpt2 else shape for name, shape in affine.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in affine.items() if _has_bias(config, name)}
    inner = ("ln_1", "ln_2") if is_gpt2 else ("input_layernorm", "post_attention_layernorm")
    norms = [f"{_layer_name(config, n)}.{name}" for n in range(config.num_layers) for name in inner]
    norms += ["transformer.ln_f" if is_gpt2 else "model.norm"]
    parts = ("weight", "bias") if is_gpt2 else ("weight",)
    tables: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocab}
    if is_gpt2:
        tables = {"transformer.wte.weight": vocab, "transformer.wpe.weight": (config.num_positions, width)}
    head = {} if config.is_tied else {"lm_head.weight": vocab}
    return {**tables, **head, **weights, **biases, **{f"{norm}.{part}": (width,) for norm in norms for part in parts}}


def _has_bias(config: ModelConfig, name: str) -> bool:
    inputs, outputs, perceptron = config.has_bias
    if ".mlp." in name:
        return perceptron
    return outputs if name.endswith("o_proj") else inputs


def run(
    config: ModelConfig,
    run_pass: ForwardPass,
    inputs: Mapping[str, Any],
    cache: Sequence[Cache] | None = None,
    start: Any = 0,
) -> tuple[jax.Array, list[Cache]]:
    """Return the logits ``(B, T, V)``, and keys and values of all layers.

    Args:
        config: sizes of the model.
        run_pass: parameters of the pass.
        inputs: ``input_ids``, and optionally ``attention_mask``, both ``(B, T)``.
        cache: keys and values of earlier tokens, with room for these tokens; None without earlier tokens.
        start: position of the first of these tokens.
    """
    ids = inputs["input_ids"]
    places = start + jnp.arange(ids.shape[1])
    earlier = jnp.arange(ids.shape[1] if cache is None else cache[0][0].shape[1])
    allowed = (earlier <= places[:, None])[None]
    if config.window is not None:
        allowed = allowed & (earlier > places[:, None] - config.window)
    if inputs.get("attention_mask") is not None:
        allowed = allowed & (inputs["attention_mask"] != 0)[:, None, :]
    is_gpt2 = config.kind == "gpt2"
    if is_gpt2:
        x_BTE = run_pass.embed("transformer.wte", ids) + run_pass.embed("transformer.wpe", places[None])
    else:
        x_BTE = run_pass.embed("model.embed_tokens", ids, pad=config.pad_token)
    angles = places[:, None] * jnp.asarray(config.inverse_frequencies)
    new = []
    for layer in range(config.num_layers):
        block = _gpt2_layer if is_gpt2 else _llama_layer
        memory = None if cache is None else (*cache[layer], start)
        x_BTE, kept = block(config, run_pass, _layer_name(config, layer), x_BTE, allowed, angles, memory)
        new.append(kept)
    return _logits(config, run_pass, x_BTE), new


def _logits(config: ModelConfig, run_pass: ForwardPass, x_BTE: jax.Array) -> jax.Array:
    if config.kind == "gpt2":
        x_BTE = run_pass.layer_norm("transformer.ln_f", x_BTE, config.epsilon)
    else:
        x_BTE = run_pass.rms_norm("model.norm", x_BTE, config.epsilon)
    table = "transformer.wte" if config.kind == "gpt2" else "model.embed_tokens"
    return x_BTE @ run_pass.get(f"{table if config.is_tied else 'lm_head'}.weight").T


def _remember(key: jax.Array, value: jax.Array, memory: Any) -> Cache:
    """Return keys and values of all positions, the earlier ones from the cache."""
    if memory is None:
        return key, value
    keys, values, start = memory
    first, second = (
        lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
        for old, new in ((keys, key), (values, value))
    )
    return first, second


def _gpt2_layer(
    config: ModelConfig, run_pass: ForwardPass, name: str, x_BTE: Any, allowed: Any, angles: Any, memory: Any
) -> tuple[jax.Array, Cache]:
    normed = run_pass.layer_norm(f"{name}.ln_1", x_BTE, config.epsilon)
    query, key, value = (
        heads(part, config.head_width) for part in jnp.split(run_pass.linear(f"{name}.attn.c_attn", normed), 3, axis=-1)
    )
    kept = _remember(key, value, memory)
    mixed_BTE = attend(query, *kept, allowed)
    x_BTE = x_BTE + run_pass.linear(f"{name}.attn.c_proj", mixed_BTE)
    normed = run_pass.layer_norm(f"{name}.ln_2", x_BTE, config.epsilon)
    up_BTE = ACTIVATIONS[config.activation](run_pass.linear(f"{name}.mlp.c_fc", normed))
    return x_BTE + run_pass.linear(f"{name}.mlp.c_proj", up_BTE), kept


def _llama_layer(
    config: ModelConfig, run_pass: ForwardPass, name: str, x_BTE: Any, allowed: Any, angles: Any, memory: Any
) -> tuple[jax.Array, Cache]:
    normed = run_pass.rms_norm(f"{name}.input_layernorm", x_BTE, config.epsilon)
    query, key, value = (
        heads(run_pass.linear(f"{name}.self_attn.{part}_proj", normed), config.head_width) for part in "qkv"
    )
    kept = _remember(rotate(key, angles), value, memory)
    mixed_BTE = attend(rotate(query, angles), *kept, allowed)
    x_BTE = x_BTE + run_pass.linear(f"{name}.self_attn.o_proj", mixed_BTE)
    normed = run_pass.rms_norm(f"{name}.post_attention_layernorm", x_BTE, config.epsilon)
    gate_BTE = ACTIVATIONS[config.activation](run_pass.linear(f"{name}.mlp.gate_proj", normed))
    return x_BTE + run_pass.linear(
        f"{name}.mlp.down_proj", gate_BTE * run_pass.linear(f"{name}.mlp.up_proj", normed)
    ), kept
