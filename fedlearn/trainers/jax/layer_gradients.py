"""Norms and weighted sums of per-example gradients of flax layers, from their inputs and output gradients.

The norm and the sum of a layer always use the same per-example gradients, so an example adds at most its clipped norm.

Shapes: B batch, T positions (1, time steps, pixels), F inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

EXACT = jax.lax.Precision.HIGHEST  # the default of some GPUs rounds factors to 11 bits
TINY = float(jnp.finfo(jnp.float32).tiny)  # squares below this number count as zero
# A Gram matrix loses a norm below 2^-6.5 of the sum of the lengths of its terms to rounding. Norms are at least that.
ROUNDING = 2**10 * float(jnp.finfo(jnp.float32).eps)


class Share(NamedTuple):
    """The per-example gradients of a layer, in implicit form."""

    squared_norm_B: jax.Array  # squared norm of the gradient of each example
    weighted_sum: Callable[[jax.Array, jax.Array], Any]  # (counts_B, factor_B) -> sum of factor_i gradient_i


def layer_share(layer: nn.Module, params: Any, inputs_B: jax.Array, gradient_B: jax.Array) -> Share:
    """Return the share of one layer.

    Gram matrices give the norms of affine layers and embeddings. Vector-Jacobian products, one per example, give the
    gradients of other layers.

    Args:
        layer: the layer, outside its model.
        params: parameters of the layer.
        inputs_B: inputs of the layer, for each example.
        gradient_B: gradient of the loss of each example with respect to the outputs of the layer.
    """
    if type(layer) in (nn.Dense, nn.DenseGeneral) and _is_affine(layer, inputs_B.ndim - 1):
        num_outputs = prod(params["kernel"].shape[-_num_output_axes(layer) :])
        num_inputs = params["kernel"].size // num_outputs
        batch = len(inputs_B)
        a_BTF, d_BTO = inputs_B.reshape(batch, -1, num_inputs), gradient_B.reshape(batch, -1, num_outputs)
        return _affine(params, a_BTF.astype(jnp.float32), d_BTO.astype(jnp.float32))
    if type(layer) is nn.Embed and layer.num_embeddings > 1:
        d_BTO = gradient_B.reshape(len(gradient_B), -1, layer.features).astype(jnp.float32)
        return _embedding(params["embedding"], inputs_B.reshape(len(inputs_B), -1), d_BTO)

    def pull_back(inputs: jax.Array, gradient: jax.Array) -> Any:
        _, vjp = jax.vjp(lambda params: layer.apply({"params": params}, inputs), params)
        return vjp(gradient)[0]

    return gradient_share(jax.vmap(pull_back)(inputs_B, gradient_B))


def gradient_share(gradient_B: Any) -> Share:
    """Return the share of parameters whose per-example gradients are in memory."""

    def weighted_sum(counts_B: jax.Array, factor_B: jax.Array) -> Any:
        return jax.tree.map(lambda g_B: _combine(factor_B, _select_examples(counts_B, g_B)), gradient_B)

    leaves = [jnp.sum(leaf_B.reshape(len(leaf_B), -1) ** 2, 1) for leaf_B in jax.tree.leaves(gradient_B)]
    return Share(jnp.sum(jnp.stack(leaves), 0), weighted_sum)


def _is_affine(layer: Any, input_ndim: int) -> bool:
    """Return whether the layer is a plain affine map of the last axes of its inputs."""
    if layer.dot_general is not None or layer.dot_general_cls is not None:
        return False
    if type(layer) is nn.Dense:
        return True
    axes = layer.axis if isinstance(layer.axis, tuple | list) else (layer.axis,)
    last = list(range(input_ndim - len(axes), input_ndim))
    return not layer.batch_dims and [axis % input_ndim for axis in axes] == last


def _num_output_axes(layer: Any) -> int:
    return 1 if isinstance(layer.features, int) else len(layer.features)


def _affine(params: Any, a_BTF: jax.Array, d_BTO: jax.Array) -> Share:
    """Return the share of an affine layer: weight ``sum_t a_t d_t^T``, bias ``sum_t d_t``."""
    kernel = _weight(params["kernel"].shape, a_BTF, d_BTO)
    if "bias" not in params:
        return Share(kernel.squared_norm_B, lambda *weights: {"kernel": kernel.weighted_sum(*weights)})
    bias = gradient_share(d_BTO.sum(1))

    def weighted_sum(counts_B: jax.Array, factor_B: jax.Array) -> Any:
        bias_sum = bias.weighted_sum(counts_B, factor_B).reshape(params["bias"].shape)
        return {"kernel": kernel.weighted_sum(counts_B, factor_B), "bias": bias_sum}

    return Share(kernel.squared_norm_B + bias.squared_norm_B, weighted_sum)


def _weight(shape: tuple[int, ...], a_BTF: jax.Array, d_BTO: jax.Array) -> Share:
    """Return the share of a weight: from Gram matrices, or from the gradients if they are smaller."""
    _, positions, features = a_BTF.shape
    if positions > 1 and 2 * positions**2 > features * d_BTO.shape[2]:
        products = gradient_share(jnp.einsum("btf,bto->bfo", a_BTF, d_BTO, precision=EXACT))
        return products._replace(weighted_sum=lambda *weights: products.weighted_sum(*weights).reshape(shape))

    def weighted_sum(counts_B: jax.Array, factor_B: jax.Array) -> jax.Array:
        scaled = _select_examples(counts_B, d_BTO) * _broadcast_like(factor_B, d_BTO)
        a = _select_examples(counts_B, a_BTF)
        return jnp.einsum("bti,btj->ij", a, scaled, precision=EXACT).reshape(shape)

    a_BT, d_BT = (jnp.sum(v**2, 2) + TINY * v.shape[2] for v in (a_BTF, d_BTO))
    if positions == 1:
        return Share((a_BT * d_BT)[:, 0], weighted_sum)
    squared_B = jnp.sum(_gram(a_BTF) * _gram(d_BTO), (1, 2))
    return Share(jnp.maximum(squared_B, ROUNDING * jnp.sum(jnp.sqrt(a_BT * d_BT), 1) ** 2), weighted_sum)


def _embedding(table: jax.Array, index_BT: jax.Array, d_BTO: jax.Array) -> Share:
    """Return the share of an embedding: example i adds ``d_it`` to row ``index_it``."""
    index_BT = jnp.where(index_BT < 0, index_BT + len(table), index_BT)  # negative rows count from the end
    same_BTT = index_BT[:, :, None] == index_BT[:, None, :]
    squared_B = jnp.sum(_gram(d_BTO) * same_BTT, (1, 2))
    length_B = jnp.sum(jnp.sqrt(jnp.sum(d_BTO**2, 2)), 1)

    def weighted_sum(counts_B: jax.Array, factor_B: jax.Array) -> Any:
        scaled = _select_examples(counts_B, d_BTO) * _broadcast_like(factor_B, d_BTO)
        zeros = jnp.zeros(table.shape, jnp.float32)
        return {"embedding": zeros.at[index_BT.reshape(-1)].add(scaled.reshape(-1, scaled.shape[2]))}

    return Share(jnp.maximum(squared_B, ROUNDING * length_B**2), weighted_sum)


def _gram(v_BTF: jax.Array) -> jax.Array:
    """Return the inner products of all pairs of positions, ``(B, T, T)``."""
    return jnp.einsum("btf,bsf->bts", v_BTF, v_BTF, precision=EXACT)


def _combine(factor_B: jax.Array, values_B: jax.Array) -> jax.Array:
    return jnp.tensordot(factor_B, values_B, 1, precision=EXACT)


def _select_examples(counts_B: jax.Array, values_B: jax.Array) -> jax.Array:
    """Return the values of the examples that count, and zeros for the others, also in place of NaN."""
    return jnp.where(_broadcast_like(counts_B, values_B), values_B, 0)


def _broadcast_like(values_B: jax.Array, like_B: jax.Array) -> jax.Array:
    """Return values with trailing axes of length 1, as many as ``like_B`` has axes."""
    return values_B.reshape(-1, *(1,) * (like_B.ndim - 1))
