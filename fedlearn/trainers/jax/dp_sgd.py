"""Sum clipped per-example gradients in JAX, in many layers without computing the gradients themselves.

Each example runs through the model alone, in a batch of one (``jax.vmap``). So the contribution of an example depends
on no other example, for any model and any order of axes in its layers.

Shapes: B batch, T positions (1, time steps, pixels), F inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import tracers
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlearn.trainers.jax.batch_axes import uses
from fedlearn.trainers.jax.example_keys import example_keys
from fedlearn.trainers.jax.layer_gradients import Share, gradient_share, layer_share

Path = tuple[str, ...]
LossOf = Callable[[Any, Any, Any, Any], jax.Array]  # (params, x_B, y_B, key) -> loss_B


class _Call(NamedTuple):
    """One call of a layer in the forward pass."""

    layer: nn.Module
    inputs: Any
    output: Any
    is_plain: bool  # True for a call of ``__call__`` with one argument, outside transformations of JAX


def clipped_gradient(loss_of: LossOf, *, clip: float, layerwise: bool = True) -> Callable[..., tuple[Any, jax.Array]]:
    """Return ``(params, x_B, y_B, real_B, key) -> sum_i g_i min(1, C / |g_i|)``, and the sum of the losses.

    One backward pass gives the gradients of the outputs of all layers, for each example alone. With the inputs of the
    layers, they give the norm of the gradient g_i of each example, and the sum. See `layer_share`.

    Some models need the gradient of each example instead. Such a model calls a layer twice, has layers with parameters
    inside others, or runs a layer inside ``nn.scan`` or ``nn.remat``.

    Args:
        loss_of: runs a flax model on a batch of one example.
        clip: L2 bound C on the gradient of each example, > 0.
        layerwise: False computes the gradient of each example in any case.

    *Guarantees*: one more or one fewer example changes the sum by at most C (up to rounding), for any example and any
    model. An example that is not in ``real_B``, or whose gradient is not finite, adds nothing. The key of an example
    follows from ``key`` and its content (`example_keys`).
    """

    def gradient(params: Any, x_B: Any, y_B: Any, real_B: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        examples = (x_B, y_B, example_keys(key, x_B, y_B))
        by_layer = _by_layer(loss_of, params, *examples) if layerwise else None
        shares, loss_B = by_layer or _by_example(loss_of, params, *examples)
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
    loss_of: LossOf, params: Any, x_B: Any, y_B: Any, keys_B: Any
) -> tuple[dict[Path, Share], jax.Array] | None:
    """Return a share for each layer with parameters, and the losses; None if the model needs `_by_example`."""
    owned = _owned(params)
    run = partial(_loss, partial(loss_of, params), owned)
    layers = _traced_layers(run, owned, (x_B, y_B, keys_B))
    if layers is None:
        return None
    # the gradient with respect to a zero offset is the gradient with respect to the output of the layer
    zeros = {path: jnp.zeros(call.output.shape, call.output.dtype) for path, call in layers.items()}

    def example(x: Any, y: Any, key: Any) -> Any:
        def loss(offsets: Mapping[Path, jax.Array]) -> Any:
            calls: dict[Path, list[_Call]] = {}
            value = run(offsets, calls, x, y, key)
            return value, {path: call.inputs for path, (call,) in calls.items()}

        return jax.value_and_grad(loss, has_aux=True)(zeros)

    (loss_B, inputs_B), gradients_B = jax.vmap(example)(x_B, y_B, keys_B)
    shares = {
        path: layer_share(call.layer, unflatten_dict(owned[path]), inputs_B[path], gradients_B[path])
        for path, call in layers.items()
    }
    return shares, loss_B


def uses_layers_only(loss_of: LossOf, params: Any, x: Any, y: Any, key: Any) -> bool:
    """Return whether layer-wise gradients are exact, or not used: no parameter acts outside the calls of layers.

    Args:
        loss_of: runs a flax model on a batch of one example.
        params: parameters of the model.
        x: inputs of one example.
        y: target of the example.
        key: key of the example.
    """
    owned = _owned(params)
    layers = _traced_layers(
        partial(_loss, partial(loss_of, params), owned), owned, jax.tree.map(lambda part: part[None], (x, y, key))
    )
    if layers is None:
        return True
    outputs = {path: jnp.zeros(call.output.shape, call.output.dtype) for path, call in layers.items()}

    def loss(params: Any, outputs: Any, x: Any, y: Any, key: Any) -> jax.Array:
        return _loss(partial(loss_of, params), owned, outputs, {}, x, y, key, replace=True)

    return not uses(loss, params, outputs, x, y, key)


def with_axis(x: Any) -> Any:
    """Return the inputs of one example as a batch of one."""
    return jax.tree.map(lambda part: part[None], x)


def _owned(params: Any) -> dict[Path, dict[Path, Any]]:
    """Return the parameters of each layer, by the path of the layer."""
    owned: dict[Path, dict[Path, Any]] = {}
    for path, leaf in flatten_dict(params).items():
        owned.setdefault(path[:-1], {})[path[-1:]] = leaf
    return owned


def _loss(
    loss_of: Callable[[Any, Any, Any], jax.Array],
    owners: Collection[Path],
    offsets: Mapping[Path, jax.Array],
    calls: dict[Path, list[_Call]],
    *example: Any,
    replace: bool = False,
) -> jax.Array:
    """Return the loss of an example ``x, y, key``. Record the calls of layers.

    Args:
        loss_of: runs the model.
        owners: paths of the layers.
        offsets: added to the outputs of layers, by path.
        calls: receives the calls of each layer.
        example: inputs, target and key.
        replace: whether offsets replace the outputs; default False.
    """
    (x, y, key), trace = example, tracers.current_trace()

    def watch(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output, path = method(*args, **kwargs), context.module.path
        if path not in owners or context.method_name == "setup":
            return output
        is_outside = tracers.current_trace() == trace  # nn.scan and nn.remat
        is_plain = context.method_name == "__call__" and len(args) == 1 and not kwargs and is_outside
        call = _Call(context.module.clone(parent=None), args[0] if args else None, output, is_plain)
        calls.setdefault(path, []).append(call)
        if path not in offsets:
            return output
        return offsets[path] if replace else output + offsets[path]

    with nn.intercept_methods(watch):
        return loss_of(with_axis(x), y[None], key)[0]


def _traced_layers(
    run: Callable[..., jax.Array], owned: Mapping[Path, Mapping[Path, Any]], examples: tuple[Any, Any, Any]
) -> dict[Path, _Call] | None:
    """Return the call of each layer with shapes in place of arrays; None if a layer has no share."""
    calls: dict[Path, list[_Call]] = {}

    def trace(x: Any, y: Any, key: Any) -> dict[Path, Any]:
        run({}, calls, x, y, key)
        return {path: (call[0].inputs, call[0].output) for path, call in calls.items() if _is_supported(path, call)}

    def _is_supported(path: Path, layer_calls: list[_Call]) -> bool:
        contains = any(path != other and path == other[: len(path)] for other in owned)
        arrays = (layer_calls[0].inputs, layer_calls[0].output)
        return (
            len(layer_calls) == 1
            and layer_calls[0].is_plain
            and not contains
            and all(isinstance(array, jax.Array) for array in arrays)
            and jnp.issubdtype(arrays[1].dtype, jnp.floating)
        )

    arrays = jax.tree.map(jnp.asarray, examples)
    shapes = jax.tree.map(lambda v_B: jax.ShapeDtypeStruct(v_B.shape[1:], v_B.dtype), arrays)
    traced = jax.eval_shape(trace, *shapes)
    if set(traced) != set(owned):
        return None
    layers = {path: calls[path][0]._replace(inputs=i, output=o) for path, (i, o) in traced.items()}
    repeatable = all(_is_repeatable(call, unflatten_dict(owned[path])) for path, call in layers.items())
    return layers if repeatable else None


def _is_repeatable(call: _Call, params: Any) -> bool:
    """Return whether a layer runs again outside its model: without random numbers, and with no other variables."""
    try:
        again = jax.eval_shape(lambda params, inputs: call.layer.apply({"params": params}, inputs), params, call.inputs)
    except Exception:  # any error of a module of the user
        return False
    return isinstance(again, jax.ShapeDtypeStruct) and again.shape == call.output.shape


def _by_example(loss_of: LossOf, params: Any, x_B: Any, y_B: Any, keys_B: Any) -> tuple[dict[Path, Share], jax.Array]:
    """Return one share of all parameters from the gradient of each example, and the losses."""

    def example_loss(params: Any, x: Any, y: Any, key: Any) -> jax.Array:
        return loss_of(params, with_axis(x), y[None], key)[0]

    per_example = jax.vmap(jax.value_and_grad(example_loss), in_axes=(None, 0, 0, 0))
    loss_B, gradient_B = per_example(params, x_B, y_B, keys_B)
    return {(): gradient_share(gradient_B)}, loss_B
