"""Write a continuation of a prompt with a decoder, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedlearn.errors import is_count, is_number, require
from fedlearn.trainers.jax.leaves import PARAMS
from fedlearn.trainers.jax.pretrained.model import TransformerModel

LARGEST_LENGTH = 2**20


def generate(
    model: TransformerModel,
    prompt: Any,
    *,
    num_tokens: int = 32,
    temperature: float = 0.0,
    stop_tokens: Sequence[int] = (),
    seed: int = 1,
) -> np.ndarray:
    """Return prompts with new tokens, ``(B, T + num_tokens)``.

    Args:
        model: decoder.
        prompt: token ids ``(B, T)`` without padding.
        num_tokens: number of new tokens, >= 1.
        temperature: 0 takes the most likely token; larger values sample from a flatter distribution.
        stop_tokens: tokens that end a text. The first of them fills the rest of a text.
        seed: seed of the samples.

    Raises:
        SettingError: the model is no decoder, or a value is out of range.
    """
    prompt = np.asarray(prompt, np.int32)
    require(not model.config.is_encoder, "model", model.config.kind, "a decoder, e.g. gpt2", "a decoder")
    is_prompt = prompt.ndim == 2 and prompt.size > 0
    require(is_prompt, "prompt", f"shape {prompt.shape}", "token ids (B, T) with T >= 1", "an array such as [[1]]")
    room = min(model.config.num_positions, LARGEST_LENGTH) - prompt.shape[1]
    is_short = is_count(num_tokens) and num_tokens <= room
    require(is_short, "num_tokens", num_tokens, f"a whole number in 1..{room}", "num_tokens=32")
    require(is_number(temperature, at_least=0), "temperature", temperature, "a number >= 0", "temperature=0")
    write = partial(_generate, model, num_tokens=num_tokens, temperature=temperature, stop_tokens=tuple(stop_tokens))
    run = model.jit(write)
    return np.asarray(run(model.weights[PARAMS], jnp.asarray(prompt), jax.random.key(seed)))


def _generate(
    model: TransformerModel,
    params: Any,
    prompt_BT: jax.Array,
    key: jax.Array,
    *,
    num_tokens: int,
    temperature: float,
    stop_tokens: tuple[int, ...],
) -> jax.Array:
    config, (batch, length) = model.config, prompt_BT.shape
    shape = (batch, length + num_tokens, config.num_key_value_heads, config.head_width)
    dtype = next(iter(params.values())).dtype
    empty = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)]
    logits_BTV, cache = model.continue_with(params, prompt_BT, empty, 0)

    def choose(logits_BV: jax.Array, step: Any, is_over_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens_B = jnp.argmax(logits_BV, axis=-1)
        if temperature:
            tokens_B = jax.random.categorical(jax.random.fold_in(key, step), logits_BV / temperature)
        if not stop_tokens:
            return tokens_B, is_over_B
        tokens_B = jnp.where(is_over_B, stop_tokens[0], tokens_B)
        return tokens_B, is_over_B | jnp.isin(tokens_B, jnp.array(stop_tokens))

    def step(carry: Any, number: jax.Array) -> Any:
        tokens_B, is_over_B, cache = carry
        logits_BTV, cache = model.continue_with(params, tokens_B[:, None], cache, length + number - 1)
        tokens_B, is_over_B = choose(logits_BTV[:, -1], number, is_over_B)
        return (tokens_B, is_over_B, cache), tokens_B

    first_B, is_over_B = choose(logits_BTV[:, -1], 0, jnp.zeros(batch, bool))
    _, rest_SB = lax.scan(step, (first_B, is_over_B, cache), jnp.arange(1, num_tokens))
    return jnp.concatenate([prompt_BT, first_B[:, None], rest_SB.T], axis=1)
