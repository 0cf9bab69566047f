"""Models of JAX libraries behind one small protocol: flax.linen, flax.nnx, equinox, and pairs of functions.

Shapes: B batch, C outputs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlearn.core.inputs import call_with
from fedlearn.errors import SettingError, require
from fedlearn.trainers.jax.leaves import BATCH_STATS, PARAMS, nested_paths

Variables = Mapping[str, Any]  # "params" and "batch_stats": nested mappings of arrays
Forward = Callable[..., Any]  # (module, inputs) -> outputs, and optionally train= and key=
EXPECTED = "a module of flax.linen, flax.nnx or equinox, a pair of functions (init, apply), or a TransformerModel"


@runtime_checkable
class Network(Protocol):
    """Model as pure functions of its variables.

    Attributes:
        module: the model of the user.
        is_flax: whether leaves have the names and axes of flax.
        weights: variables that the model has already; None if `init` draws them.
        draws_weights: whether `init` defines the distribution of the weights.
    """

    module: Any
    is_flax: bool
    weights: Variables | None
    draws_weights: bool

    def init(self, key: jax.Array, x: Any) -> Variables:
        """Return initial variables for inputs of this form."""

    def predict(self, variables: Variables, x: Any) -> Any:
        """Return the outputs in evaluation mode."""

    def train(self, variables: Variables, x: Any, real_B: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        """Return the outputs in training mode, and the batch statistics after the pass.

        Args:
            variables: parameters and batch statistics.
            x: inputs of the batch.
            real_B: True for examples, False for padding.
            key: key of the random numbers.
        """

    def written(self, variables: Variables, x: Any, key: jax.Array) -> Variables:
        """Return the variables after a pass in training mode."""

    def built(self, variables: Variables) -> Any:
        """Return the model with these variables, in the form of its library."""


def adapt(module: Any, *, forward: Forward | None = None) -> Network:
    """Return the network of a model.

    Args:
        module: model of the user.
        forward: runs the model, ``(module, inputs) -> outputs``; None calls it.

    Raises:
        SettingError: The model is a class, a module of another framework, or has state that updates do not include.
    """
    if isinstance(module, type):
        raise SettingError("module", f"the class {module.__name__}", "an object", f"{module.__name__}()")
    require(forward is None or callable(forward), "forward", forward, "a function (module, inputs)", "forward=null")
    if isinstance(module, Network):
        require(
            forward is None, "forward", forward, "None: a network has its methods predict and train", "forward=null"
        )
        return module
    if _is_instance(module, "flax.nnx", "Module"):
        from fedlearn.trainers.jax.nnx_network import NnxNetwork

        return NnxNetwork(module, forward)
    if _is_instance(module, "equinox", "Module"):
        from fedlearn.trainers.jax.equinox_network import EquinoxNetwork

        return EquinoxNetwork(module, forward)
    if isinstance(module, tuple) and len(module) == 2 and all(map(callable, module)):
        none = "None: apply of the pair is this function"
        require(forward is None, "forward", forward, none, "forward=null")
        return FunctionNetwork(module)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    fix = "TorchTrainer(module)" if _is_instance(module, "torch.nn", "Module") else "flax.linen.Dense(1)"
    is_linen = isinstance(module, nn.Module) or isinstance(getattr(module, "module", None), nn.Module)  # or a wrapper
    require(is_linen, "module", f"a {kind}", EXPECTED, fix)
    return LinenNetwork(module, forward)


def is_jax_model(model: Any) -> bool:
    """Return whether `adapt` accepts a model. A library that is not loaded has no models."""
    kinds = ("flax.linen", "flax.nnx", "equinox")
    is_pair = isinstance(model, tuple) and len(model) == 2 and all(map(callable, model))
    return is_pair or isinstance(model, Network) or any(_is_instance(model, kind, "Module") for kind in kinds)


def _is_instance(model: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(model, kind)


def accepted_options(function: Any, **options: Any) -> dict[str, Any]:
    """Return the options that a function declares as arguments."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


class LinenNetwork:
    """Module of flax.linen, or an object with its methods ``init`` and ``apply``.

    Args:
        module: the module. Its ``__call__`` has the argument ``train: bool`` if it behaves differently in training.
        forward: runs the module, or None.
    """

    is_flax, draws_weights = True, False

    def __init__(self, module: Any, forward: Forward | None = None) -> None:
        self.weights: Variables | None = None
        self.module, self._forward = module, forward
        self._takes_train = bool(accepted_options(forward or module.__call__, train=True))

    def _call(self, function: Callable[..., Any], first: Any, x: Any, *, train: bool, **options: Any) -> Any:
        mode: dict[str, Any] = {"train": train} if self._takes_train else {}
        if self._forward is not None:
            return function(first, x, method=self._forward, **options, **mode)
        return call_with(lambda *args, **names: function(first, *args, **names, **options, **mode), x)

    def init(self, key: jax.Array, x: Any) -> Variables:
        """Return initial variables for inputs of this form."""
        variables: Variables = self._call(self.module.init, {"params": key, "dropout": key}, x, train=False)
        return variables

    def predict(self, variables: Variables, x: Any) -> Any:
        """Return the outputs in evaluation mode."""
        return self._call(self.module.apply, variables, x, train=False)

    def train(self, variables: Variables, x: Any, real_B: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        """Return the outputs in training mode, and the batch statistics after the pass."""
        rngs = {"dropout": key, "params": jax.random.fold_in(key, 1)}  # flax draws other streams from "params"
        outputs, changed = self._call(self.module.apply, variables, x, train=True, rngs=rngs, mutable=[BATCH_STATS])
        return outputs, changed.get(BATCH_STATS, {})

    def written(self, variables: Variables, x: Any, key: jax.Array) -> Variables:
        """Return all variables after a pass in training mode."""
        rngs = {"params": key, "dropout": key}
        written: Variables = self._call(self.module.apply, variables, x, train=True, rngs=rngs, mutable=True)[1]
        return written

    def built(self, variables: Variables) -> Any:
        """Return the module and its variables."""
        return self.module, variables


@dataclass
class FunctionNetwork:
    """Pair of functions: ``init(key, x) -> params`` and ``apply(params, x) -> outputs``.

    ``params`` is any pytree of floating-point arrays. ``apply`` may have the arguments ``train`` and ``key``.

    Args:
        module: the pair.
    """

    module: tuple[Callable[..., Any], Callable[..., Any]]
    is_flax: bool = False
    weights: Variables | None = None
    draws_weights: bool = True
    _tree: Any = field(default=None, init=False)

    def init(self, key: jax.Array, x: Any) -> Variables:
        """Return initial variables for inputs of this form."""
        params = self.module[0](key, x)
        self._tree = jax.tree.structure(params)
        return {PARAMS: nested(params)}

    def predict(self, variables: Variables, x: Any) -> Any:
        """Return the outputs in evaluation mode."""
        return self._apply(variables, x, train=False, key=jax.random.key(0))

    def train(self, variables: Variables, x: Any, real_B: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        """Return the outputs in training mode. There are no batch statistics."""
        return self._apply(variables, x, train=True, key=key), {}

    def written(self, variables: Variables, x: Any, key: jax.Array) -> Variables:
        """Return nothing, because functions write no state."""
        self.train(variables, x, jnp.ones(1, bool), key)
        return {}

    def built(self, variables: Variables) -> Any:
        """Return the function ``apply`` and its parameters."""
        return self.module[1], self._params(variables)

    def _apply(self, variables: Variables, x: Any, **options: Any) -> Any:
        apply = self.module[1]
        return apply(self._params(variables), x, **accepted_options(apply, **options))

    def _params(self, variables: Variables) -> Any:
        return unnested(self._tree, variables[PARAMS])


def nested(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree as nested mappings with names as keys."""
    result: dict[str, Any] = unflatten_dict(dict(zip(nested_paths(tree), jax.tree.leaves(tree), strict=True)))
    return result


def unnested(structure: Any, leaves: Any) -> Any:
    """Return the pytree of this structure with leaves from `nested`."""
    template = jax.tree.unflatten(structure, range(structure.num_leaves))
    found = flatten_dict(leaves)
    return jax.tree.unflatten(structure, [jnp.asarray(found[path]) for path in nested_paths(template)])
