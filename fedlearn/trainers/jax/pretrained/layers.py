"""Layers of transformers as functions of named parameters, in the orientation of torch.

Shapes: B batch, T positions of queries, S positions of keys, E width, H heads, G groups of heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
Cache = tuple[jax.Array, jax.Array]  # keys and values of a layer, (B, S, G, W)


@dataclass
class ForwardPass:
    """Hold the parameters of one forward pass, and apply layers by their names.

    Args:
        params: all parameters of the base model, by their names in transformers. Frozen ones may have any type.
        dtype: type of the computation.
        adapters: matrices A and B of each adapted layer.
        merged: matrix M of each mergeable layer.
        scale: factor of the outputs of adapters.
        adapter_dropout: dropout rate at the inputs of adapters.
        head_dropout: dropout rate at the inputs of the head.
        key: key of the dropout; None in evaluation mode.
        swapped: whether weights are inputs x outputs, as in the ``Conv1D`` of GPT-2.
    """

    params: Mapping[str, jax.Array]
    dtype: jnp.dtype
    adapters: Mapping[str, tuple[jax.Array, jax.Array]] = field(default_factory=dict)
    merged: Mapping[str, jax.Array] = field(default_factory=dict)
    scale: float = 1.0
    adapter_dropout: float = 0.0
    head_dropout: float = 0.0
    key: jax.Array | None = None
    swapped: bool = False
    _draws: int = 0

    def get(self, name: str) -> jax.Array:
        """Return a parameter in the type of the computation."""
        return self.params[name].astype(self.dtype)

    def embed(self, name: str, ids: jax.Array, *, pad: int | None = None) -> jax.Array:
        """Return the vectors of tokens. Only these rows are converted to the type of the computation.

        A token ``pad`` gives no gradient to its row, as ``padding_idx`` in torch.
        """
        rows = jnp.take(self.params[f"{name}.weight"], ids, axis=0, mode="clip").astype(self.dtype)
        return rows if pad is None else jnp.where((ids == pad)[..., None], jax.lax.stop_gradient(rows), rows)

    def linear(self, name: str, x: jax.Array) -> jax.Array:
        """Apply an affine map, and its adapter if there is one."""
        weight = self.get(f"{name}.weight")
        y = x @ (weight if self.swapped else weight.T)
        if f"{name}.bias" in self.params:
            y = y + self.get(f"{name}.bias")
        if name not in self.adapters:
            return y
        if name in self.merged:
            y = y + self.scale * (x @ self.merged[name].astype(self.dtype).T)
        low, high = (matrix.astype(self.dtype) for matrix in self.adapters[name])
        return y + self.scale * (self.dropout(x, self.adapter_dropout) @ low.T @ high.T)

    def layer_norm(self, name: str, x: jax.Array, epsilon: float) -> jax.Array:
        """Normalize the last axis, with the biased variance of torch."""
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
        return normed.astype(self.dtype) * self.get(f"{name}.weight") + self.get(f"{name}.bias")

    def rms_norm(self, name: str, x: jax.Array, epsilon: float) -> jax.Array:
        """Divide the last axis by its root mean square.

        Reference: Zhang, Sennrich, *Root Mean Square Layer Normalization*, NeurIPS 2019, arXiv:1910.07467.
        """
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
        return normed.astype(self.dtype) * self.get(f"{name}.weight")

    def dropout(self, x: jax.Array, rate: float) -> jax.Array:
        """Set a share of the numbers to zero and scale the others, in training mode only.

        Each call of a pass has another key. So a pass draws equal numbers from equal keys.
        """
        if self.key is None or not rate:
            return x
        self._draws += 1
        keep = jax.random.bernoulli(jax.random.fold_in(self.key, self._draws), 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def attend(query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array) -> jax.Array:
    """Return the mean of the values of the allowed positions, weighted by the scores of their keys.

    Args:
        query: ``(B, T, H, W)``.
        key: ``(B, S, G, W)``; each of the G groups serves H / G heads.
        value: ``(B, S, G, W)``.
        allowed: ``(B or 1, T or 1, S)``, True for positions that a query attends to.

    Returns:
        ``(B, T, H * W)``. A query without an allowed position has the mean of all values.
    """
    shape, groups = query.shape, key.shape[2]
    query = query.reshape(*shape[:2], groups, shape[2] // groups, shape[3])
    scores = jnp.einsum("btghw,bsgw->bghts", query, key).astype(jnp.float32) * shape[3] ** -0.5
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bghts,bsgw->btghw", weights, value).reshape(*shape[:2], -1)


def heads(x_BTE: jax.Array, width: int) -> jax.Array:
    """Return vectors divided into heads, ``(B, T, H, W)``."""
    return x_BTE.reshape(*x_BTE.shape[:2], -1, width)


def rotate(x_BTHW: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate pairs of numbers of each head by the angles of its position, ``(T, W / 2)``.

    A pair is a number of the first half and the same number of the second half, as in transformers.
    """
    cos, sin = (part[None, :, None].astype(x_BTHW.dtype) for part in (jnp.cos(angles), jnp.sin(angles)))
    first, second = jnp.split(x_BTHW, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
