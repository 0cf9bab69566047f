"""Read and write the variables of a model as one flat vector, and run the model.

Shapes: B batch, D parameters, C outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from fedlearn.core.layout import Layout
from fedlearn.core.records import Array
from fedlearn.errors import FedlearnError
from fedlearn.trainers.contract import choose_output, select_output
from fedlearn.trainers.jax.contract import initial_shapes, input_form, require_types
from fedlearn.trainers.jax.leaves import (
    BATCH_STATS,
    PARAMS,
    JaxLeaf,
    Path,
    from_torch,
    named_arrays,
    to_torch,
    torch_leaves,
)
from fedlearn.trainers.jax.networks import Network


class FlatModel:
    """Hold a model, and the names and axes of its variables in torch.

    Args:
        network: the model.
        input_shape: shape of the input of one example, see `input_form`; not read if the model has its weights.
        output: key, position or attribute of the outputs; None for a model that returns an array.

    Attributes:
        form: shape and type of each input; None if the model has its weights.
        layout: layout of parameters and buffers.
        parameters: place of each parameter in the layout, by its path.
        statistics: place of each buffer in the layout, by its path.

    Raises:
        SettingError: The model has state other than ``params`` and ``batch_stats``.
    """

    def __init__(self, network: Network, input_shape: Any, output: str | int | None) -> None:
        self.network, self._output = network, output
        self.form = None if network.weights else input_form(input_shape)
        shapes = initial_shapes(network, self.form)
        require_types(shapes)
        kinds = (PARAMS, BATCH_STATS)
        self.parameters, self.statistics = (torch_leaves(shapes, kind, is_flax=network.is_flax) for kind in kinds)
        self.layout = Layout.from_shapes(*([leaf[:2] for leaf in leaves.values()] for leaves in self._places))

    @property
    def _places(self) -> tuple[Mapping[Path, JaxLeaf], Mapping[Path, JaxLeaf]]:
        return self.parameters, self.statistics

    def initial_statistics(self, variables: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
        """Return the initial buffers by their names in torch, from these variables or from the model."""
        if not self.statistics:
            return {}
        if variables is None:
            variables = self._initial_variables(jax.random.key(0))
        return named_arrays(variables, BATCH_STATS, self.statistics)

    def draw(self, layout: Layout, rng: np.random.Generator) -> np.ndarray:
        """Return parameters from the function ``init`` of the model."""
        variables = self._initial_variables(jax.random.key(int(rng.integers(2**31))))
        return layout.pack(named_arrays(variables, PARAMS, self.parameters))

    def _initial_variables(self, key: jax.Array) -> Mapping[str, Any]:
        return self.network.init(key, jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), self.form))

    def variables(self, params_D: Array) -> dict[str, Any]:
        """Return the variables of the model with these parameters and buffers."""
        return {PARAMS: self.unflatten(params_D), BATCH_STATS: self.unflatten_statistics(params_D)}

    def training_variables(self, params_D: Array, x: Any) -> Any:
        """Return the variables after a forward pass in training mode."""
        return self.network.written(self.variables(params_D), x, jax.random.key(0))

    def training_outputs(self, params: Any, stats: Any, x: Any, real_B: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        """Return the outputs in training mode, and the statistics after the batch."""
        with nn.intercept_methods(partial(_call_with_real_rows, real_B)):
            outputs, changed = self.network.train({PARAMS: params, BATCH_STATS: stats}, x, real_B, key)
        return self.select(outputs), changed

    def select(self, outputs: Any) -> Any:
        """Return the part of the result of the model that holds the outputs."""
        if isinstance(outputs, jax.Array):
            return outputs
        return choose_output(outputs) if self._output is None else select_output(outputs, self._output)

    def outputs(self, params_D: jax.Array, x: Any) -> jax.Array:
        """Return the outputs in evaluation mode for these parameters and buffers."""
        return self.eval_outputs(self.unflatten(params_D), self.unflatten_statistics(params_D), x)

    def eval_outputs(self, params: Any, stats: Any, x: Any) -> Any:
        """Return the outputs in evaluation mode for these variables."""
        return self.select(self.network.predict({PARAMS: params, BATCH_STATS: stats}, x))

    def unflatten(self, params_D: Array) -> Any:
        """Return the trainable part of the vector, as parameters of the model."""
        return self._unflatten(params_D, self.parameters)

    def unflatten_statistics(self, params_D: Array) -> Any:
        """Return the buffers of the vector, as ``batch_stats``."""
        return self._unflatten(params_D, self.statistics)

    def _unflatten(self, params_D: Array, places: Mapping[Path, JaxLeaf]) -> Any:
        leaves = {}
        for path, leaf in places.items():
            leaves[path] = from_torch(leaf, params_D[self.layout.slices[leaf.name]].reshape(leaf.shape))
        return unflatten_dict(leaves)

    def flatten(self, params: Any, stats: Any) -> jax.Array:
        """Return parameters and statistics as one vector ``(D,)``."""
        leaves = {place.name: to_torch(place, leaf) for place, leaf in self._with_places(params, stats)}
        vector_D = jnp.zeros(self.layout.num_parameters, jnp.result_type(*leaves.values()))
        for leaf in self.layout.leaves:  # XLA copies leaves in place, but joins them number by number
            start = (self.layout.slices[leaf.name].start,)
            vector_D = lax.dynamic_update_slice(vector_D, leaves[leaf.name].ravel(), start)
        return vector_D

    def write_rows(self, rows_KD: np.ndarray, params: Any, stats: Any) -> None:
        """Write parameters and statistics of K clients, leaf by leaf, as rows of vectors."""
        for place, leaf_K in self._with_places(params, stats):
            rows_KD[:, self.layout.slices[place.name]] = np.asarray(_to_torch_rows(place, leaf_K))

    def _with_places(self, params: Any, stats: Any) -> Iterator[tuple[JaxLeaf, Any]]:
        for places, values in zip(self._places, (params, stats), strict=True):
            for path, leaf in flatten_dict(values).items():
                yield places[path], leaf


@partial(jax.jit, static_argnums=0)
def _to_torch_rows(place: JaxLeaf, leaf_K: jax.Array) -> jax.Array:
    """Return a leaf of K clients with the axes of torch, one row per client."""
    return jax.vmap(partial(to_torch, place))(leaf_K).reshape(len(leaf_K), -1)


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
