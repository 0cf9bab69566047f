"""Sum clipped per-example gradients in JAX, in many layers without computing the gradients themselves.

Shapes: B batch, T positions (1, time steps, pixels), F inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

Path = tuple[str, ...]
LossOf = Callable[[Any, Any, Any, Any], jax.Array]  # (params, x_B, y_B, key) -> loss_B


class _Call(NamedTuple):
    """One call of a layer in the forward pass."""

    layer: nn.Module
    inputs: Any
    output: Any
    is_plain: bool  # True if the model called ``__call__`` with one argument


class _Share(NamedTuple):
    """The per-example gradients of a layer, in implicit form."""

    squared_norm_B: jax.Array  # squared norm of the gradient of each example
    weighted_sum: Callable[[jax.Array, jax.Array], Any]  # (counts_B, factor_B) -> sum of factor_i gradient_i


def clipped_gradient(loss_of: LossOf, *, clip: float) -> Callable[..., tuple[Any, jax.Array]]:
    """Return ``(params, x_B, y_B, real_B, key) -> sum_i g_i min(1, C / |g_i|)``, and the sum of the losses.

    The method equals the one in `fedlearn.trainers.torch.dp_sgd`. One backward pass gives the gradients of the outputs
    of all layers. With the inputs of the layers, they give the norm of the gradient g_i of each example. Gram matrices
    give the norms of affine layers and embeddings. Vector-Jacobian products, one per example, give the norms of other
    layers. One more product per layer gives the sum, from output gradients times the clipping factors.

    Two kinds of models need the gradient of each example instead. One kind calls a layer twice. The other kind has
    layers with parameters inside other layers with parameters.

    Args:
        loss_of: runs a flax model. The loss of one example must not depend on other examples.
        clip: L2 bound C on the gradient of each example, > 0.

    *Guarantees*: one more or one fewer example changes the sum by at most C (up to rounding), for any example. An
    example that is not in ``real_B``, or whose gradient is not finite, adds nothing.
    """

    def gradient(params: Any, x_B: Any, y_B: Any, real_B: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        by_layer = _by_layer(lambda: loss_of(params, x_B, y_B, key), params, len(real_B))
        shares, loss_B = by_layer or _by_example(loss_of, params, x_B, y_B, key)
        norm_B = jnp.sqrt(jnp.maximum(sum(share.squared_norm_B for share in shares.values()), 0.0))
        counts_B = real_B & jnp.isfinite(norm_B)
        factor_B = jnp.where(counts_B, clip / jnp.maximum(norm_B, clip), 0.0)
        sums: dict[Path, Any] = {}
        for path, share in shares.items():
            sums |= {
                (*path, *name): leaf for name, leaf in flatten_dict(share.weighted_sum(counts_B, factor_B)).items()
            }
        return unflatten_dict(sums), jnp.sum(jnp.where(counts_B, loss_B, 0.0))

    return gradient


def _by_layer(
    run: Callable[[], jax.Array], params: Any, num_examples: int
) -> tuple[dict[Path, _Share], jax.Array] | None:
    """Return a share for each layer with parameters, and the losses.

    The result is None if the model calls such a layer twice, or if one such layer contains another.
    """
    owned: dict[Path, dict[Path, Any]] = {}
    for path, leaf in flatten_dict(params).items():
        owned.setdefault(path[:-1], {})[path[-1:]] = leaf
    traced: dict[Path, list[_Call]] = {}
    jax.eval_shape(lambda: _losses(run, owned, {}, traced))
    if not _supports_layers(traced, owned, num_examples):
        return None

    def total(offsets: Mapping[Path, jax.Array]) -> Any:
        calls: dict[Path, list[_Call]] = {}
        loss_B = _losses(run, owned, offsets, calls)
        return jnp.sum(loss_B), (loss_B, {path: call.inputs for path, (call,) in calls.items()})

    # the gradient with respect to a zero offset is the gradient with respect to the output of the layer
    zeros = {path: jnp.zeros(call.output.shape, call.output.dtype) for path, (call,) in traced.items()}
    gradients, (loss_B, inputs) = jax.grad(total, has_aux=True)(zeros)
    shares = {
        path: _share(call.layer, unflatten_dict(owned[path]), inputs[path], gradients[path])
        for path, (call,) in traced.items()
    }
    return shares, loss_B


def _losses(
    run: Callable[[], jax.Array],
    owners: Collection[Path],
    offsets: Mapping[Path, jax.Array],
    calls: dict[Path, list[_Call]],
) -> jax.Array:
    """Return the losses. Add ``offsets`` to the outputs of the layers, and record their calls in ``calls``."""

    def watch(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output, path = method(*args, **kwargs), context.module.path
        if path not in owners or context.method_name == "setup":
            return output
        is_plain = context.method_name == "__call__" and len(args) == 1 and not kwargs
        call = _Call(context.module.clone(parent=None), args[0] if args else None, output, is_plain)
        calls.setdefault(path, []).append(call)
        return output + offsets[path] if path in offsets else output

    with nn.intercept_methods(watch):
        return run()


def _supports_layers(calls: Mapping[Path, list[_Call]], owners: Collection[Path], num_examples: int) -> bool:
    """Return whether the model calls each layer with parameters once, and no such layer contains another."""
    nested = any(path != other and path == other[: len(path)] for path in owners for other in owners)
    once = all(len(layer_calls) == 1 and layer_calls[0].is_plain for layer_calls in calls.values())
    outputs = [layer_calls[0].output for layer_calls in calls.values()]
    arrays = all(isinstance(output, jax.Array) and len(output) == num_examples for output in outputs)
    return set(calls) == set(owners) and not nested and once and arrays


def _by_example(loss_of: LossOf, params: Any, x_B: Any, y_B: Any, key: Any) -> tuple[dict[Path, _Share], jax.Array]:
    """Return one share of all parameters from the gradient of each example, and the losses."""

    def example_loss(params: Any, x: Any, y: Any, key: Any) -> jax.Array:
        return loss_of(params, x[None], y[None], key)[0]

    keys_B = jax.random.split(key, len(y_B))
    per_example = jax.vmap(jax.value_and_grad(example_loss), in_axes=(None, 0, 0, 0))
    loss_B, gradient_B = per_example(params, x_B, y_B, keys_B)

    def weighted_sum(counts_B: jax.Array, factor_B: jax.Array) -> Any:
        return jax.tree.map(lambda g_B: jnp.tensordot(factor_B, _select_examples(counts_B, g_B), 1), gradient_B)

    return {(): _Share(_squared_norm(gradient_B), weighted_sum)}, loss_B


def _share(layer: nn.Module, params: Any, inputs: jax.Array, gradient: jax.Array) -> _Share:
    def pull_back(inputs: jax.Array, gradient: jax.Array) -> Any:
        """Return the gradient of the parameters from the gradient of the outputs."""
        _, vjp = jax.vjp(lambda params: layer.apply({"params": params}, inputs), params)
        return vjp(gradient)[0]

    def weighted_sum(counts_B: jax.Array, factor_B: jax.Array) -> Any:
        scaled = _select_examples(counts_B, gradient) * _broadcast_like(factor_B, gradient)
        return pull_back(_select_examples(counts_B, inputs), scaled)

    if isinstance(layer, nn.Dense):
        squared_norm_B = _squared_norm_of_affine(layer, _positions(inputs), _positions(gradient))
    elif isinstance(layer, nn.Embed):
        squared_norm_B = _squared_norm_of_embedding(inputs.reshape(len(inputs), -1), _positions(gradient))
    else:
        squared_norm_B = _squared_norm(jax.vmap(lambda a, d: pull_back(a[None], d[None]))(inputs, gradient))
    return _Share(squared_norm_B, weighted_sum)


def _squared_norm_of_affine(layer: nn.Dense, a_BTF: jax.Array, d_BTO: jax.Array) -> jax.Array:
    """Return the squared norm of the gradient of an affine layer: weight ``|sum_t d_t a_t^T|^2``, plus bias.

    Gram matrices give the norm of the weight, or the product if it is smaller.
    """
    _, positions, features = a_BTF.shape
    if positions == 1:
        squared_B = jnp.sum(a_BTF**2, (1, 2)) * jnp.sum(d_BTO**2, (1, 2))
    elif 2 * positions**2 <= features * d_BTO.shape[2]:
        squared_B = jnp.sum((a_BTF @ a_BTF.swapaxes(1, 2)) * (d_BTO @ d_BTO.swapaxes(1, 2)), (1, 2))
    else:
        squared_B = jnp.sum((d_BTO.swapaxes(1, 2) @ a_BTF) ** 2, (1, 2))
    return squared_B + jnp.sum(d_BTO.sum(1) ** 2, 1) if layer.use_bias else squared_B


def _squared_norm_of_embedding(index_BT: jax.Array, d_BTO: jax.Array) -> jax.Array:
    """Return the squared norm of the gradient of an embedding: example i adds ``d_it`` to row ``index_it``."""
    same_BTT = index_BT[:, :, None] == index_BT[:, None, :]
    return jnp.sum((d_BTO @ d_BTO.swapaxes(1, 2)) * same_BTT, (1, 2))


def _squared_norm(tree_B: Any) -> jax.Array:
    leaves = [jnp.sum(leaf_B.reshape(len(leaf_B), -1) ** 2, 1) for leaf_B in jax.tree.leaves(tree_B)]
    return jnp.sum(jnp.stack(leaves), 0)


def _positions(values: jax.Array) -> jax.Array:
    """Return values ``(B, ..., F)`` as ``(B, T, F)``."""
    return values.reshape(len(values), -1, values.shape[-1])


def _select_examples(counts_B: jax.Array, values_B: jax.Array) -> jax.Array:
    """Return the values of the examples that count, and zeros for the others, also in place of NaN."""
    return jnp.where(_broadcast_like(counts_B, values_B), values_B, 0)


def _broadcast_like(values_B: jax.Array, like_B: jax.Array) -> jax.Array:
    """Return values with trailing axes of length 1, as many as ``like_B`` has axes."""
    return values_B.reshape(-1, *(1,) * (like_B.ndim - 1))
