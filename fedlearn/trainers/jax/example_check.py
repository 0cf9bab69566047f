"""Check before DP-SGD that a flax model and its loss keep the examples of a batch apart.

Shapes: B batch, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.extend.random import define_prng_impl
from jax.extend.random import threefry_prng_impl as threefry

from fedlearn.core.records import Examples
from fedlearn.errors import SettingError
from fedlearn.trainers.example_check import BATCHES, Evaluated, agree, find_mixing, probe_examples, refuse
from fedlearn.trainers.jax.batch_axes import has_separate_examples
from fedlearn.trainers.jax.block_arrays import to_device
from fedlearn.trainers.jax.dp_sgd import clipped_gradient, uses_layers_only

Apply = Callable[[Any, Any, jax.Array], Any]  # (params, x_B, key) -> outputs_BC, in training mode
Case = tuple[Any, Examples]  # parameters and examples
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compile in half the time
NO_CLIP = 1e30
CONSTANT, RANDOM = 0, 1


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleCheck:
    """Compare examples alone, as DP-SGD trains them, with examples in batches.

    Args:
        apply: runs the model in training mode.
        loss: ``(outputs_BC, y_B) -> loss_B``.
        jit: compiles a function that runs the model.
        options: options of the compiler.
    """

    apply: Apply
    loss: Callable[[Any, Any], Any]
    jit: Callable[..., Any] = jax.jit
    options: Mapping[str, Any] | None = None

    def is_layerwise(self, params: Any, examples: Examples, *, synthetic: bool) -> bool:
        """Return whether the layer-wise gradients of the model are its gradients.

        Args:
            params: parameters of the model. The check adds noise, because mixing is invisible if weights are zero.
            examples: examples of a client.
            synthetic: see `probe_examples`.

        Raises:
            SettingError: The outputs, losses or gradients of an example depend on other examples of its batch.
        """
        groups = list(islice(probe_examples(examples, synthetic=synthetic), 2))
        self._require_shapes(params, groups[0])
        if self._is_proven(params, groups[0]):
            return True
        cases = list(product((params, _perturbed(params)), groups))
        fault, case = self._find_fault(cases, layerwise=True)
        if not fault:
            return True
        if fault == "gradients":
            fault, case = self._find_fault(cases, layerwise=False)
            if not fault:
                return False
        raise refuse(self._reason(fault, *case))

    def _is_proven(self, params: Any, group: Examples) -> bool:
        """Return whether the operations of model and loss prove the result. This takes no compiled program."""

        def run(x_B: Any, y_B: Any, params: Any, key: Any) -> Any:
            return self._run(params, x_B, y_B, key)

        def loss_of(params: Any, x_B: Any, y_B: Any, key: Any) -> Any:
            return self._run(params, x_B, y_B, key)[1]

        x, y, key = jax.tree.map(lambda part: part[0], to_device(group.x[:1])), group.y[0], _key(CONSTANT)
        return has_separate_examples(run, (x, y), params, key) and uses_layers_only(loss_of, params, x, y, key)

    def _find_fault(self, cases: list[Case], *, layerwise: bool) -> tuple[str, Case]:
        """Return the first difference and its case, or "" and the first case."""
        for params, group in cases:
            fault = find_mixing(partial(self._evaluate, params, layerwise), group)
            fault = fault or ("" if self._is_separate(params, group) else "outputs")
            if fault:
                return fault, (params, group)
        return "", cases[0]

    def _is_separate(self, params: Any, group: Examples) -> bool:
        """Return whether another last example leaves all other outputs unchanged, at equal random numbers."""
        x, other, y = _replaced(group)
        outputs, others = (self._together(params, to_device(v), y, _key(RANDOM))[0][:-1] for v in (x, other))
        return agree(np.asarray(outputs), np.asarray(others))

    def _evaluate(self, params: Any, layerwise: bool, x_B: np.ndarray, y_B: np.ndarray) -> Evaluated:
        run = self._together if len(y_B) > 1 else self._alone[layerwise]
        outputs_BC, loss_B, gradient = run(params, to_device(x_B), y_B, _key(CONSTANT))
        leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(gradient)]
        return Evaluated(np.asarray(outputs_BC), np.asarray(loss_B), np.concatenate(leaves))

    @cached_property
    def _together(self) -> Callable[..., Any]:
        def run(params: Any, x_B: Any, y_B: Any, key: Any) -> Any:
            def total(params: Any) -> Any:
                outputs_BC, loss_B = self._run(params, x_B, y_B, key)
                return jnp.sum(loss_B), (outputs_BC, loss_B)

            gradient, (outputs_BC, loss_B) = jax.grad(total, has_aux=True)(params)
            return outputs_BC, loss_B, gradient

        return self._compile(run)

    @cached_property
    def _alone(self) -> dict[bool, Callable[..., Any]]:
        def run(layerwise: bool, params: Any, x_B: Any, y_B: Any, key: Any) -> Any:
            def loss_of(params: Any, x_B: Any, y_B: Any, _: Any) -> Any:
                return self._run(params, x_B, y_B, key)[1]

            gradient_of = clipped_gradient(loss_of, clip=NO_CLIP, layerwise=layerwise)
            gradient, _ = gradient_of(params, x_B, y_B, jnp.ones(len(y_B), bool), jax.random.key(0))
            return *self._run(params, x_B, y_B, key), gradient

        return {layerwise: self._compile(partial(run, layerwise)) for layerwise in (True, False)}

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = self.jit(function, compiler_options=self.options)

        def run(*args: Any) -> Any:
            with jax.default_matmul_precision("highest"):
                return compiled(*args)

        return run

    def _run(self, params: Any, x_B: Any, y_B: Any, key: Any) -> tuple[Any, Any]:
        outputs_BC = self.apply(params, x_B, key)
        return outputs_BC, self.loss(outputs_BC, y_B)

    def _require_shapes(self, params: Any, group: Examples) -> None:
        """Refuse a loss without one number per example, and a model that needs several examples."""
        for size in (2, 1):
            x_B, y_B = to_device(group.x[:size]), jnp.asarray(group.y[:size])
            try:
                _, loss_B = jax.eval_shape(self._run, params, x_B, y_B, _key(CONSTANT))
            except Exception as error:
                if size > 1 or isinstance(error, SettingError):
                    raise
                raise refuse(f"it fails on a single example ({str(error).splitlines()[0][:80]})") from error
            if loss_B.shape != (size,):
                raise refuse(f"the loss {_name(self.loss)} returns shape {loss_B.shape} for {size} examples")

    def _reason(self, fault: str, params: Any, group: Examples) -> str:
        """Return the name of the first module whose outputs depend on other examples."""
        if fault == "losses":
            return f"the loss {_name(self.loss)} of an example depends on other examples"
        rows, key = BATCHES[-1], _key(CONSTANT)
        batch = self._calls(params, group.x[rows], key)
        parts = [self._calls(params, group.x[n : n + 1], key) for n in range(rows.start, rows.stop)]
        draws = [self._calls(params, x, _key(RANDOM)) for x in _replaced(group)[:2]]
        for together, *apart in [*zip(batch, *parts, strict=False), *zip(*draws, strict=False)]:
            inputs, outputs = (
                _is_mixed(getattr(together, kind), [getattr(call, kind) for call in apart])
                for kind in ("inputs", "outputs")
            )
            if outputs and not inputs:
                return f"{together.name} mixes the examples of a batch"
        name = batch[-1].name if batch else "the model"
        return f"the {fault} of {name} for an example depend on other examples"

    def _calls(self, params: Any, x_B: Any, key: Any) -> list[_Call]:
        """Return the calls of all modules, in the order of completion."""
        calls: list[_Call] = []

        def watch(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            output = method(*args, **kwargs)
            if context.method_name == "__call__":
                first = args[0] if args else None
                calls.append(_Call(describe_module(context.module), _concrete(first), _concrete(output)))
            return output

        with nn.intercept_methods(watch), jax.default_matmul_precision("highest"):
            self.apply(params, to_device(x_B), key)
        return calls


class _Call(NamedTuple):
    """One call of a module. Inputs and outputs are None if they are no arrays, or inside ``nn.scan``."""

    name: str
    inputs: np.ndarray | None
    outputs: np.ndarray | None


def _concrete(value: Any) -> np.ndarray | None:
    is_array = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
    return np.asarray(value) if is_array else None


def _is_mixed(together: np.ndarray | None, apart: list[np.ndarray | None]) -> bool:
    """Return whether the array of a batch differs from the arrays of its examples, along any axis for the batch.

    ``apart`` may also have one array: the array of the batch after its last example was replaced.
    """
    arrays = [array for array in apart if array is not None]
    if together is None or len(arrays) < len(apart):
        return False
    if len(arrays) == 1:
        return arrays[0].shape == together.shape and not agree(together[:-1], arrays[0][:-1])
    for axis, size in enumerate(together.shape):
        single = (*together.shape[:axis], 1, *together.shape[axis + 1 :])
        if size == len(arrays) and all(array.shape == single for array in arrays):
            return not agree(together, np.concatenate(arrays, axis))
    return False


def _replaced(group: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the inputs of a batch, the inputs with another last example, and the targets."""
    x, y = group.x[BATCHES[-1]], group.y[BATCHES[-1]]
    return x, np.concatenate([x[:-1], group.x[:1]]), y


def describe_module(module: nn.Module) -> str:
    """Return the path and the class of a module, for errors."""
    path = ".".join(module.path)
    return f"{path} ({type(module).__name__})" if path else type(module).__name__


def refuse_written_state(variables: Callable[[], Mapping[str, Any]]) -> None:
    """Refuse a model that writes state in a forward pass, such as batch statistics.

    Args:
        variables: runs the model in training mode, and returns its variables after that.

    Raises:
        SettingError: The model writes variables other than parameters.
    """
    modules: dict[tuple[str, ...], str] = {}

    def watch(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        modules.setdefault(context.module.path, describe_module(context.module))
        return method(*args, **kwargs)

    with nn.intercept_methods(watch):
        written = jax.eval_shape(variables)
    for kind in sorted(set(written) - {"params", "intermediates"}):
        for path in flatten_dict(written[kind]):
            owner = max((p for p in modules if path[: len(p)] == p), key=len, default=())
            name = modules.get(owner, "the model")
            raise refuse(f"the {kind} of {name}, which a forward pass writes, mix the examples of a batch")


def _perturbed(params: Any) -> Any:
    """Return parameters plus noise that is small against their usual initial values."""
    rng = np.random.default_rng(1)

    def perturb(leaf: Any) -> Any:
        num_inputs = max(1, leaf.size // leaf.shape[-1]) if leaf.ndim > 1 else 4
        return leaf + rng.normal(0, 0.5 * num_inputs**-0.5, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(perturb, params)


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _key(mode: int) -> jax.Array:
    return jax.random.wrap_key_data(jnp.array([mode, 0, 1], jnp.uint32), impl=_SWITCHED)


def _bits(key: Any, bit_width: int, shape: tuple[int, ...]) -> Any:
    """Return random bits, or in the mode `CONSTANT` equal bits at all places: a uniform number of 1/16."""
    drawn = threefry.random_bits(key[1:], bit_width, shape)
    return jnp.where(key[0] == CONSTANT, jnp.array(1 << (bit_width - 4), drawn.dtype), drawn)


def _with_mode(mode: Any, keys: Any) -> Any:
    return jnp.concatenate([jnp.broadcast_to(mode, (*keys.shape[:-1], 1)), keys], axis=-1)


_SWITCHED = define_prng_impl(
    key_shape=(3,),
    seed=lambda seed: _with_mode(jnp.uint32(RANDOM), threefry.seed(seed)),
    split=lambda key, shape: _with_mode(key[0], threefry.split(key[1:], shape)),
    random_bits=_bits,
    fold_in=lambda key, data: _with_mode(key[0], threefry.fold_in(key[1:], data)),
    name="switched",
    tag="sw",
)
