"""Train a module of flax.nnx.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlearn.core.inputs import call_with
from fedlearn.errors import SettingError
from fedlearn.trainers.jax.leaves import BATCH_STATS, PARAMS
from fedlearn.trainers.jax.networks import Forward, Variables, accepted_options

KINDS = (nnx.Param, nnx.BatchStat, nnx.RngState)  # the rest is constant


class NnxNetwork:
    """Module of flax.nnx as pure functions.

    Parameters are ``nnx.Param``, and batch statistics are ``nnx.BatchStat``. The key of a training step replaces the
    keys of all random streams. Other variables are constants.

    Args:
        module: the module.
        forward: runs the module, or None.
    """

    is_flax, draws_weights = True, False

    def __init__(self, module: nnx.Module, forward: Forward | None = None) -> None:
        self.module, self._forward = module, forward
        parts: Any = nnx.split(module, *KINDS, ...)
        self._graph, self._params, self._stats, self._streams, self._constants = parts
        self.weights: Variables | None = {PARAMS: _nested(self._params), BATCH_STATS: _nested(self._stats)}

    def init(self, key: jax.Array, x: Any) -> Variables:
        """Return the variables of the module."""
        assert self.weights is not None
        return self.weights

    def predict(self, variables: Variables, x: Any) -> Any:
        """Return the outputs in evaluation mode."""
        return self._run(self.built(variables), x, train=False, key=jax.random.key(0))

    def train(self, variables: Variables, x: Any, real_B: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        """Return the outputs in training mode, and the batch statistics after the pass.

        Raises:
            SettingError: The pass writes variables that are no batch statistics.
        """
        module = self._merge(variables, _with_key(self._streams, key))
        module.train()
        for _, part in nnx.iter_modules(module):
            if type(part) is nnx.BatchNorm:
                part.__class__ = _MaskedBatchNorm
                object.__setattr__(part, "real_B", real_B)
        outputs = self._run(module, x, train=True, key=key)
        parts: Any = nnx.split(module, *KINDS, nnx.Intermediate, ...)
        _, _, stats, _, _, rest = parts
        self._refuse_changes(rest)
        return outputs, _nested(stats)

    def written(self, variables: Variables, x: Any, key: jax.Array) -> Variables:
        """Return the batch statistics after a pass in training mode."""
        _, stats = self.train(variables, x, jnp.ones(len(jax.tree.leaves(x)[0]), bool), key)
        return {BATCH_STATS: stats} if stats else {}

    def built(self, variables: Variables) -> Any:
        """Return a module with these variables, in evaluation mode."""
        module = self._merge(variables, self._streams)
        module.eval()
        return module

    def _merge(self, variables: Variables, streams: Any) -> Any:
        stats = variables.get(BATCH_STATS, {})
        params = _filled(self._params, variables[PARAMS])
        return nnx.merge(self._graph, params, _filled(self._stats, stats), _copy(streams), _copy(self._constants))

    def _run(self, module: Any, x: Any, *, train: bool, key: jax.Array) -> Any:
        options: dict[str, Any] = {"train": train, "rngs": nnx.Rngs(key)}
        if self._forward is not None:
            return self._forward(module, x, **accepted_options(self._forward, **options, key=key))
        return call_with(module, x, **accepted_options(module.__call__, **options))

    def _refuse_changes(self, rest: Any) -> None:
        before = {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(self._constants)[0]}
        for path, leaf in jax.tree_util.tree_flatten_with_path(rest)[0]:
            if before.get(_path(path)) is not leaf:
                value = f"a model that writes the variable {'.'.join(_path(path))}"
                expected = "a model that writes only nnx.BatchStat, because updates do not include other state"
                raise SettingError("module", value, expected, "nnx.GroupNorm, or a model without this variable")


class _MaskedBatchNorm(nnx.BatchNorm):
    """Batch norm with statistics of real examples only, and the running variance of torch."""

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        fixed = self.use_running_average if use_running_average is None else use_running_average
        if fixed:
            return super().__call__(x, use_running_average=True)
        real_B, before = vars(self)["real_B"], self.var[...]
        if len(x) != len(real_B):
            value, expected = f"a batch norm with {len(x)} rows", f"{len(real_B)} rows, one per example"
            raise SettingError("module", value, expected, "nnx.GroupNorm")
        outputs = super().__call__(x, use_running_average=False, mask=real_B.reshape(-1, *(1,) * (x.ndim - 1)))
        count = real_B.sum() * (x.size // len(x) // before.size)  # number of values per channel
        decayed = self.momentum * before
        change = self.var[...] - decayed
        self.var[...] = decayed + change * count / jnp.maximum(count - 1, 1)
        return outputs


def _path(path: Any) -> tuple[str, ...]:
    """Return the names in the path of a variable, without the attribute of its value."""
    keys = [getattr(key, "key", None) for key in path]
    return tuple(str(key) for key in keys if key is not None)


def _nested(state: Any) -> dict[str, Any]:
    """Return the values of a state as nested mappings with names as keys."""
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
    result: dict[str, Any] = unflatten_dict(leaves)
    return result


def _filled(state: Any, values: Mapping[str, Any]) -> Any:
    """Return a state of this structure with other values."""
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    found = flatten_dict(values)
    return jax.tree.unflatten(structure, [jnp.asarray(found[_path(path)]) for path, _ in paths])


def _copy(state: Any) -> Any:
    """Return new variables with the same values. A trace of JAX may not write variables of another trace."""
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))


def _with_key(streams: Any, key: jax.Array) -> Any:
    """Return random streams whose keys follow from a key, with counts of zero."""
    leaves, structure = jax.tree.flatten(streams)
    new = [
        jax.random.fold_in(key, number) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, new)
