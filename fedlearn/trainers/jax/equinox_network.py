"""Train a module of equinox.

Shapes: B batch.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

from fedlearn.core.inputs import call_with
from fedlearn.errors import SettingError, require
from fedlearn.trainers.jax.leaves import PARAMS
from fedlearn.trainers.jax.networks import Forward, Variables, accepted_options, nested, unnested


class EquinoxNetwork:
    """Module of equinox as pure functions.

    All floating-point arrays are parameters. The module gets one example at a time, as the layers of equinox expect
    it. ``forward`` gets the whole batch. An argument ``key`` of the module gets another key for each example.

    Args:
        module: the module.
        forward: runs the module on a batch, or None.

    Raises:
        SettingError: The module has state, or an array in two places.
    """

    is_flax, draws_weights = False, False

    def __init__(self, module: Any, forward: Forward | None = None) -> None:
        self.module, self._forward = module, forward
        _refuse_state(module)
        params, self._rest = eqx.partition(module, eqx.is_inexact_array)
        _refuse_tied(params)
        self._tree = jax.tree.structure(params)
        self.weights: Variables | None = {PARAMS: nested(params)}

    def init(self, key: jax.Array, x: Any) -> Variables:
        """Return the variables of the module."""
        assert self.weights is not None
        return self.weights

    def predict(self, variables: Variables, x: Any) -> Any:
        """Return the outputs in evaluation mode."""
        return self._run(variables, x, jax.random.key(0), train=False)

    def train(self, variables: Variables, x: Any, real_B: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        """Return the outputs in training mode. There are no batch statistics."""
        return self._run(variables, x, key, train=True), {}

    def written(self, variables: Variables, x: Any, key: jax.Array) -> Variables:
        """Return nothing: a module of equinox writes no state."""
        self._run(variables, x, key, train=True)
        return {}

    def built(self, variables: Variables) -> Any:
        """Return a module with these parameters, in evaluation mode."""
        return self._merge(variables, train=False)

    def _merge(self, variables: Variables, *, train: bool) -> Any:
        params = unnested(self._tree, variables[PARAMS])
        return eqx.nn.inference_mode(eqx.combine(params, self._rest), value=not train)

    def _run(self, variables: Variables, x: Any, key: jax.Array, *, train: bool) -> Any:
        module = self._merge(variables, train=train)
        if self._forward is not None:
            return self._forward(module, x, **accepted_options(self._forward, train=train, key=key))
        mode = accepted_options(module.__call__, train=train)
        takes_key = bool(accepted_options(module.__call__, key=key))

        def example(x: Any, key: Any) -> Any:
            return call_with(module, x, **mode, **({"key": key} if takes_key else {}))

        num_examples = len(jax.tree.leaves(x)[0])
        return jax.vmap(example)(x, jax.random.split(key, num_examples))


def _refuse_state(module: Any) -> None:
    """Refuse modules with state, such as a batch norm."""
    is_index = lambda node: isinstance(node, eqx.nn.StateIndex)  # noqa: E731
    for path, leaf in jax.tree_util.tree_flatten_with_path(module, is_leaf=is_index)[0]:
        if is_index(leaf):
            name = jax.tree_util.keystr(path[:-1]).lstrip(".") or type(module).__name__
            expected = "a model without eqx.nn.State, because updates do not include it"
            raise SettingError("module", f"a model with the state of {name}", expected, "eqx.nn.GroupNorm")


def _refuse_tied(params: Any) -> None:
    """Refuse an array in two places: training would give each place its own values."""
    places: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path).lstrip(".")
        first = places.setdefault(id(leaf), name)
        value, expected = f"a model with one array at {first} and {name}", "eqx.nn.Shared for tied arrays"
        require(first == name, "module", value, expected, "eqx.nn.Shared")
