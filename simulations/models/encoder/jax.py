"""Pretrained text encoder in JAX (flax linen). `simulations.models.encoder.torch` has the same model.

Shapes: B batch, T positions, E width, A heads, R rank, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from math import sqrt
from threading import local
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from simulations.models.encoder import MASK_PENALTY, EncoderConfig, FineTuning

Module = nn.Module


class Layer(nn.Module):
    """Self-attention and a two-layer perceptron, each with a residual connection and then a layer norm."""

    config: EncoderConfig
    tuning: FineTuning
    adapted_modules: tuple[str, ...]
    train: bool

    @nn.compact
    def __call__(self, x_BTE: jax.Array, real_BT: jax.Array) -> jax.Array:
        """Map token vectors ``(B, T, E)`` to token vectors ``(B, T, E)``."""
        shape = (*x_BTE.shape[:2], self.config.num_heads, -1)
        query, key, value = (self._map(name, x_BTE).reshape(shape).swapaxes(1, 2) for name in ("query", "key", "value"))
        score_BATT = query @ key.swapaxes(2, 3) / sqrt(query.shape[-1]) - MASK_PENALTY * ~real_BT[:, None, None, :]
        mixed_BTAE = (jax.nn.softmax(score_BATT, axis=-1) @ value).swapaxes(1, 2)
        x_BTE = _norm("norm_0", self.config)(x_BTE + self._map("mix", mixed_BTAE.reshape(x_BTE.shape)))
        up_BTE = nn.gelu(self._map("up", x_BTE), approximate=False)
        return _norm("norm_1", self.config)(x_BTE + self._map("down", up_BTE))

    def _map(self, name: str, x_BTE: jax.Array) -> jax.Array:
        """Apply an affine map of the layer, and its adapter if there is one."""
        _, outputs = self.config.projections[name]
        y_BTE = nn.Dense(outputs, name=name)(x_BTE)
        if name not in self.adapted_modules:
            return y_BTE
        low_BTR = nn.Dense(self.tuning.rank, use_bias=False, name=f"{name}_a")(_dropout(x_BTE, self.tuning, self.train))
        return y_BTE + self.tuning.scale * nn.Dense(outputs, use_bias=False, name=f"{name}_b")(low_BTR)


class Encoder(nn.Module):
    """BERT's encoder, a mean over the tokens of a text, then an affine map."""

    config: EncoderConfig
    tuning: FineTuning
    num_outputs: int

    @nn.compact
    def __call__(self, x_BT: jax.Array, train: bool = False) -> jax.Array:
        """Map token numbers ``(B, T)`` to outputs ``(B, C)``."""
        sizes, real_BT = self.config, x_BT > 0
        places_BT = jnp.broadcast_to(jnp.arange(x_BT.shape[1]), x_BT.shape)
        words_BTE = nn.Embed(sizes.vocab_size, sizes.width, name="token_embedding")(x_BT.astype(jnp.int32))
        x_BTE = _norm("norm", sizes)(
            words_BTE + nn.Embed(sizes.length, sizes.width, name="position_embedding")(places_BT)
        )
        for layer in range(sizes.num_layers):
            adapted = self.tuning.adapted_modules(layer, num_layers=sizes.num_layers)
            x_BTE = Layer(sizes, self.tuning, adapted, train, name=f"layer_{layer}")(x_BTE, real_BT)
        total_BE = (x_BTE * real_BT[:, :, None]).sum(1)
        mean_BE = total_BE / jnp.maximum(real_BT.sum(1, keepdims=True), 1)
        return nn.Dense(self.num_outputs, name="out")(_dropout(mean_BE, self.tuning, train))


def _dropout(x: jax.Array, tuning: FineTuning, train: bool) -> jax.Array:
    """Apply dropout. Call it inside a compact method only."""
    outputs: jax.Array = nn.Dropout(tuning.dropout, deterministic=not train)(x)
    return outputs


def _norm(name: str, sizes: EncoderConfig) -> nn.LayerNorm:
    """Return a layer norm with the variance of torch."""
    return nn.LayerNorm(epsilon=sizes.epsilon, use_fast_variance=False, name=name)


def build_encoder(
    config: EncoderConfig, tuning: FineTuning, num_outputs: int, frozen: Mapping[str, np.ndarray]
) -> PartiallyFrozenModule:
    """Build an encoder with a head. Parameters in ``frozen`` have these values, and training does not change them."""
    return PartiallyFrozenModule(Encoder(config, tuning, num_outputs), frozen)


class PartiallyFrozenModule:
    """A module with frozen parameters. Its variables contain the trained parameters only.

    The frozen values are an argument of each compiled program. So memory has one copy for all programs and clients. As
    constants, 90 MB, they would be part of each program, and of each program that JAX caches on disk.

    Args:
        module: module with all parameters.
        frozen: values of the frozen parameters, by their names in torch.
    """

    def __init__(self, module: nn.Module, frozen: Mapping[str, np.ndarray]) -> None:
        self.module, self._frozen, self._traced = module, dict(_to_flax(*item) for item in frozen.items()), local()

    def __call__(self, x_BT: jax.Array, train: bool = False) -> jax.Array:
        """Return the outputs of the inner module. The module must be bound."""
        outputs: jax.Array = self.module(x_BT, train=train)
        return outputs

    def init(self, *args: Any, **options: Any) -> Any:
        """Return the initial variables without the frozen parameters."""
        variables = self.module.init(*args, **options)
        leaves = flatten_dict(variables["params"])
        return {**variables, "params": unflatten_dict({k: v for k, v in leaves.items() if k not in self._frozen})}

    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        """Apply the inner module with these variables and the frozen parameters."""
        frozen = getattr(self._traced, "values", None) or self._values
        params = unflatten_dict({**frozen, **flatten_dict(variables["params"])})
        return self.module.apply({**variables, "params": params}, *args, **options)

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Compile a function that applies this module, with the options of ``jax.jit``."""

        def traced(frozen: Any, *args: Any) -> Any:
            with self._traced_values(frozen):
                return function(*args)

        compiled = jax.jit(traced, **options)
        return lambda *args: compiled(self._values, *args)

    @cached_property
    def _values(self) -> Any:  # created on first use, when the device is known
        with jax.ensure_compile_time_eval():  # the first use may be in a trace, whose values must not stay
            return {path: jnp.asarray(value) for path, value in self._frozen.items()}

    @contextmanager
    def _traced_values(self, frozen: Any) -> Iterator[None]:
        self._traced.values = frozen
        try:
            yield
        finally:
            del self._traced.values


def _to_flax(name: str, value: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the path of a torch parameter in flax, and its value in the orientation of flax."""
    *path, kind = name.split(".")
    if kind == "bias":
        return (*path, kind), value
    if path[0] in ("token_embedding", "position_embedding"):
        return (*path, "embedding"), value
    return ((*path, "scale"), value) if value.ndim == 1 else ((*path, "kernel"), value.T)
