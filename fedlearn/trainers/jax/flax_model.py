"""Read and write the variables of a flax module as one flat vector, and run the module.

Shapes: B batch, D parameters, C outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlearn.core.layout import RUNNING_MEAN, RUNNING_VARIANCE, Layout
from fedlearn.core.records import Array
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.trainers.contract import select_output
from fedlearn.trainers.jax.contract import initial_shapes, require_types

BATCH_STATS = "batch_stats"  # name of the flax collection with the buffers of a model
LEAF_NAMES = {  # flax -> torch
    "params": {"kernel": "weight", "scale": "weight", "embedding": "weight"},
    BATCH_STATS: {"mean": RUNNING_MEAN, "var": RUNNING_VARIANCE},
}
Path = tuple[str, ...]  # path of a leaf in flax
NamedShape = tuple[str, tuple[int, ...]]  # name and shape of a leaf in torch


class FlaxModel:
    """Hold a linen module, and the names and axes of its variables in torch.

    Args:
        module: the module.
        input_shape: shape of the input of one example.
        output: key, position or attribute of the outputs; None for a module that returns an array.

    Attributes:
        layout: layout of parameters and buffers.
        parameters: torch name and shape of each parameter, by its path.
        statistics: torch name and shape of each buffer, by its path.

    Raises:
        SettingError: The module has state other than ``params`` and ``batch_stats``.
    """

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...], output: str | int | None) -> None:
        self.module, self._output, self._input_shape = module, output, input_shape
        self.takes_train = "train" in inspect.signature(module.__call__).parameters
        self._eval: dict[str, Any] = {"train": False} if self.takes_train else {}
        self._keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        shapes = initial_shapes(module, self._keys, input_shape, **self._eval)
        if set(shapes) - {"params", BATCH_STATS}:
            unknown = ", ".join(sorted(set(shapes) - {"params", BATCH_STATS}))
            expected = f"no state other than params and {BATCH_STATS}, because updates do not include it"
            raise SettingError("module", f"a model with the state {unknown}", expected, "a model without this state")
        require_types(shapes)
        self.parameters, self.statistics = (_torch_leaves(shapes, kind) for kind in ("params", BATCH_STATS))
        self.layout = Layout.from_shapes(self.parameters.values(), self.statistics.values())

    def initial_statistics(self, variables: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
        """Return the initial buffers by their names in torch, from these variables or from the module."""
        if not self.statistics:
            return {}
        if variables is None:
            variables = self.module.init(self._keys, jnp.zeros((1, *self._input_shape)), **self._eval)
        return named_arrays(variables, BATCH_STATS, self.statistics)

    def training_variables(self, params_D: Array, x: np.ndarray) -> Any:
        """Return all variables after a forward pass in training mode."""
        variables = {"params": self.unflatten(params_D), BATCH_STATS: self.unflatten_statistics(params_D)}
        train: dict[str, Any] = {"train": True} if self.takes_train else {}
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
        return self.module.apply(variables, jnp.asarray(x), rngs=rngs, mutable=True, **train)[1]

    def training_outputs(
        self, params: Any, stats: Any, x: jax.Array, real_B: jax.Array, key: jax.Array
    ) -> tuple[Any, Any]:
        """Return the outputs in training mode, and the statistics after the batch."""
        train: dict[str, Any] = {"train": True} if self.takes_train else {}
        with nn.intercept_methods(partial(_call_with_real_rows, real_B)):
            rngs = {"dropout": key, "params": jax.random.fold_in(key, 1)}  # flax draws other streams from "params"
            options: dict[str, Any] = {"rngs": rngs, "mutable": [BATCH_STATS], **train}
            outputs, changed = self.module.apply({"params": params, BATCH_STATS: stats}, x, **options)
        return self.select(outputs), changed.get(BATCH_STATS, {})

    def select(self, outputs: Any) -> Any:
        """Return the part of the result of the module that holds the outputs."""
        return outputs if self._output is None else select_output(outputs, self._output)

    def outputs(self, params_D: jax.Array, x: jax.Array) -> jax.Array:
        """Return the outputs in evaluation mode for these parameters and buffers."""
        return self.eval_outputs(self.unflatten(params_D), self.unflatten_statistics(params_D), x)

    def eval_outputs(self, params: Any, stats: Any, x: jax.Array) -> Any:
        """Return the outputs in evaluation mode for these flax variables."""
        return self.select(self.module.apply({"params": params, BATCH_STATS: stats}, x, **self._eval))

    def unflatten(self, params_D: Array) -> Any:
        """Return the trainable part of the vector, as flax parameters."""
        return self._as_flax(params_D, self.parameters)

    def unflatten_statistics(self, params_D: Array) -> Any:
        """Return the buffers of the vector, as flax ``batch_stats``."""
        return self._as_flax(params_D, self.statistics)

    def _as_flax(self, params_D: Array, names: Mapping[Path, NamedShape]) -> Any:
        leaves = {}
        for path, (name, shape) in names.items():
            leaves[path] = _to_flax(path, params_D[self.layout.slices[name]].reshape(shape))
        return unflatten_dict(leaves)

    def flatten(self, params: Any, stats: Any) -> jax.Array:
        """Return flax parameters and statistics as one vector ``(D,)``."""
        leaves = {self.parameters[path][0]: _to_torch(path, leaf) for path, leaf in flatten_dict(params).items()}
        leaves |= {self.statistics[path][0]: _to_torch(path, leaf) for path, leaf in flatten_dict(stats).items()}
        return jnp.concatenate([leaves[leaf.name].ravel() for leaf in self.layout.leaves])


def _call_with_real_rows(real_B: jax.Array, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Call a module. A batch norm computes statistics of real rows only, and the running variance of torch.

    Raises:
        FedlearnError: A batch norm has another number of rows than the batch.
    """
    norm = context.module
    if not isinstance(norm, nn.BatchNorm) or context.method_name != "__call__":
        return call(*args, **kwargs)
    x, fixed = args[0], [*args[1:], kwargs.get("use_running_average"), norm.use_running_average]
    if any(fixed):
        return call(*args, **kwargs)
    if len(x) != len(real_B):
        raise FedlearnError(
            f"the batch norm {'.'.join(norm.path)} has {len(x)} rows\n"
            f"  expected  {len(real_B)} rows, one per example\n"
            "  advice    group norm"
        )
    before: Any = norm.get_variable(BATCH_STATS, "var")
    outputs = call(*args, **{**kwargs, "mask": real_B.reshape(-1, *(1,) * (x.ndim - 1))})
    count = real_B.sum() * (x.size // len(x) // before.size)  # number of values per channel
    decayed = norm.momentum * before
    change = norm.get_variable(BATCH_STATS, "var") - decayed
    norm.put_variable(BATCH_STATS, "var", decayed + change * count / jnp.maximum(count - 1, 1))
    return outputs


def _torch_leaves(variables: Mapping[str, Any], kind: str) -> dict[Path, NamedShape]:
    """Return the torch names and shapes of the leaves of one flax collection, by their paths."""
    leaves = {}
    for path, leaf in flatten_dict(variables.get(kind, {})).items():
        name = ".".join([*path[:-1], LEAF_NAMES[kind].get(path[-1], path[-1])])
        leaves[path] = name, tuple(np.empty(leaf.shape, np.bool_).transpose(_axes_to_torch(path, leaf.ndim)).shape)
    return leaves


def named_arrays(variables: Mapping[str, Any], kind: str, leaves: Mapping[Path, NamedShape]) -> dict[str, np.ndarray]:
    """Return the arrays of a flax collection by their names and axes in torch.

    Raises:
        SettingError: The collection lacks a leaf of the module, or a shape differs.
    """
    values = flatten_dict(variables.get(kind, {}))
    arrays = {}
    for path, (name, shape) in leaves.items():
        array = np.asarray(_to_torch(path, values[path]), np.float32) if path in values else None
        actual = "nothing" if array is None else f"shape {array.shape}"
        expected = f"an array of shape {shape} at {'/'.join(path)}, as module.init returns it"
        if array is None or array.shape != shape:
            raise SettingError(f"variables[{kind!r}]", actual, expected, "variables=module.init(key, x)")
        arrays[name] = array
    return arrays


def _axes_to_torch(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Return the order of axes that turns a flax leaf into a torch leaf.

    Flax kernels are (..., inputs, outputs). Torch weights are (outputs, inputs, ...).
    """
    return (ndim - 1, ndim - 2, *range(ndim - 2)) if path[-1] == "kernel" else tuple(range(ndim))


def _to_torch(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
    return leaf.transpose(_axes_to_torch(path, leaf.ndim))


def _to_flax(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
    return leaf.transpose(tuple(np.argsort(_axes_to_torch(path, leaf.ndim)).tolist()))
