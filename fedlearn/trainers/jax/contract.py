"""Check a model of JAX and its loss on the shapes and types of a few examples.

JAX traces the programs of training and evaluation without compiling them, so the check takes some milliseconds.

Shapes: N examples, B batch, C outputs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fedlearn.core.inputs import describe_inputs, map_inputs, split_inputs
from fedlearn.core.model_report import ModelReport, ModelWarning
from fedlearn.core.records import Examples
from fedlearn.core.tasks import Task
from fedlearn.errors import FedlearnError, SettingError, require
from fedlearn.trainers.contract import (
    Remedies,
    are_finite,
    cause_of,
    probe_rows,
    refuse_failing_loss,
    refuse_structure,
    require_finite_outputs,
    require_inputs,
    require_loss,
    require_outputs,
    require_parameters,
    require_targets,
    takes,
    warn_of_probabilities,
    warn_of_unused,
    within_classes,
)
from fedlearn.trainers.jax.leaves import BATCH_STATS, PARAMS
from fedlearn.trainers.jax.networks import Network

REMEDIES = Remedies(
    head="nn.Dense({outputs})",
    as_column="outputs[:, None] at the end of __call__",
    as_float="outputs.astype('float32') at the end of __call__",
)
MODES = ("deterministic", "training", "is_training", "use_running_average")  # common names of a mode of training
Params = Mapping[str, Any]


def input_form(input_shape: Any) -> Any:
    """Return shape and type of a batch of one example, ``jax.ShapeDtypeStruct``, for each input of a model.

    Args:
        input_shape: shape of one example, a ``jax.ShapeDtypeStruct``, or a mapping or a tuple of these. The type of a
            structured array of examples describes several inputs.

    Raises:
        SettingError: It is something else.
    """
    if getattr(input_shape, "names", None):
        parts = {name: np.zeros((), input_shape[name].base) for name in input_shape.names}
        forms = {
            name: jax.ShapeDtypeStruct(input_shape[name].shape, jnp.asarray(part).dtype) for name, part in parts.items()
        }
        input_shape = tuple(forms.values()) if input_shape.names[0].isdigit() else forms
    if isinstance(input_shape, Mapping):
        return {name: input_form(part) for name, part in input_shape.items()}
    if isinstance(input_shape, tuple) and input_shape and not all(map(is_whole, input_shape)):
        return tuple(map(input_form, input_shape))
    is_form = isinstance(input_shape, jax.ShapeDtypeStruct)
    is_shape = isinstance(input_shape, tuple | list) and all(map(is_whole, input_shape))
    expected = "the shape of one example, or a mapping from the names of inputs to shapes"
    require(is_form or is_shape, "input_shape", input_shape, expected, "JaxTrainer(module, input_shape=x.shape[1:])")
    shape, dtype = (input_shape.shape, input_shape.dtype) if is_form else (input_shape, jnp.float32)
    return jax.ShapeDtypeStruct((1, *shape), dtype)


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, as in a shape."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def initial_shapes(network: Network, form: Any) -> Any:
    """Return the shapes and types of all variables of a model.

    Raises:
        SettingError: The model fails on inputs of this form, or has state that updates do not include.
    """
    try:
        shapes = jax.eval_shape(network.init, jax.random.key(0), form)
    except FedlearnError:
        raise
    except Exception as error:
        raise _explain(error, network.module, form, form) from error
    unknown = ", ".join(sorted(set(shapes) - {PARAMS, BATCH_STATS}))
    expected = f"no state other than params and {BATCH_STATS}, because updates do not include it"
    require(not unknown, "module", f"a model with the state {unknown}", expected, "a model without this state")
    return shapes


def require_types(shapes: Any) -> None:
    """Warn about parameters that become float32. Refuse parameters that are no floating-point numbers."""
    types = {"/".join(path): leaf.dtype for path, leaf in flatten_dict(shapes.get("params", {})).items()}
    for name, dtype in types.items():
        ok = jnp.issubdtype(dtype, jnp.floating)
        value = f"a model with the parameter {name} in {dtype}"
        require(ok, "module", value, "parameters in float32", "param_dtype=jnp.float32")
    others = sorted({str(dtype) for dtype in types.values() if dtype != jnp.float32})
    if others:
        text = f"module has parameters in {', '.join(others)}; the trainer changes them to float32"
        warnings.warn(text, ModelWarning, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class ModuleCheck:
    """Trace a module and its loss on the shapes of a few examples.

    Args:
        module: the module.
        task: the task.
        loss: ``(outputs_BC, y_B) -> loss_B``.
        has_custom_loss: whether the loss is not the loss of the task.
        form: shapes and types with which the module was initialised; None if it has its weights.
        names: name of each parameter in the layout, by its path in flax.
        train: runs the module in training mode, ``(params, x_B) -> outputs_BC``.
        predict: runs the module in evaluation mode, ``(params, x_B) -> outputs_BC``.
        jit: compiles a function that runs the module.
    """

    module: Any
    task: Task
    loss: Callable[[Any, Any], Any]
    has_custom_loss: bool
    form: Any
    names: Mapping[tuple[str, ...], str]
    train: Callable[[Any, Any], Any]
    predict: Callable[[Any, Any], Any]
    jit: Callable[..., Any]

    def check(self, params: Params, examples: Examples, *, synthetic: bool) -> ModelReport:
        """Check types, shapes and gradients.

        Args:
            params: parameters of the module.
            examples: examples of a client.
            synthetic: whether the result must not depend on the values of the examples.

        Raises:
            SettingError: The module or its loss does not fit.
        """
        require_inputs(examples)
        require_parameters(len(self.names), (), fix="a model with a layer, such as nn.Dense")
        few = probe_rows(examples, synthetic=synthetic)
        x = _inputs(few)
        outputs, traced = self._trace(self.predict, params, x)
        num_outputs = outputs.shape[self.task.class_axis]
        if not synthetic:  # a refusal of a real client must not depend on its targets
            require_targets(examples, self.task, num_outputs, REMEDIES)
        trained, _ = self._trace(self.train, params, x)
        unused = self._unused(params, x, jnp.asarray(within_classes(few.y, self.task, num_outputs)), trained)
        texts = warn_of_probabilities(np.zeros((0, 1)), self.task, last_layer(traced))
        return ModelReport(
            num_outputs=num_outputs,
            unused=unused,
            warnings=(*self._warn_of_mode(), *texts, *warn_of_unused(unused)),
        )

    def check_values(self, params: Params, examples: Examples, *, synthetic: bool) -> None:
        """Refuse outputs and losses that are not finite. This compiles a program."""
        few = probe_rows(examples, synthetic=synthetic)

        def run(params: Any, x_B: Any, y_B: Any) -> tuple[Any, Any]:
            outputs_BC = self.predict(params, x_B)
            return outputs_BC, self.loss(outputs_BC, y_B)

        outputs_BC, loss_B = map(np.asarray, self.jit(run)(params, _inputs(few), jnp.asarray(few.y)))
        require_finite_outputs(outputs_BC)
        require_loss(self.loss, loss_B.shape, num_examples=len(few), finite=are_finite(loss_B, outputs_BC))

    def _trace(self, run: Callable[[Any, Any], Any], params: Params, x_B: Any) -> tuple[Any, Any]:
        """Return shape and type of the outputs, and the traced program."""
        try:
            traced, outputs = jax.make_jaxpr(run, return_shape=True)(params, x_B)
        except FedlearnError:
            raise
        except Exception as error:
            raise _explain(error, self.module, x_B, self.form) from error
        if not hasattr(outputs, "shape"):
            raise refuse_structure(outputs)
        require_outputs(
            outputs.shape,
            str(outputs.dtype),
            num_examples=len(jax.tree.leaves(x_B)[0]),
            task=self.task,
            has_custom_loss=self.has_custom_loss,
            remedies=REMEDIES,
        )
        return outputs, traced

    def _unused(self, params: Params, x_B: Any, y_B: Any, outputs: Any) -> tuple[str, ...]:
        """Return the names of the parameters on which the loss does not depend."""
        try:
            loss_B = jax.eval_shape(self.loss, outputs, y_B)
        except FedlearnError:
            raise
        except Exception as error:
            shapes = f"outputs {outputs.shape}", f"targets {y_B.shape} of {y_B.dtype}"
            raise refuse_failing_loss(self.loss, *shapes, error) from error
        shape = getattr(loss_B, "shape", None)
        require_loss(self.loss, shape, num_examples=len(y_B), kind=f"a {type(loss_B).__name__}")

        def total(leaves: dict[str, Any]) -> Any:
            nested = {path: leaves[name] for path, name in self.names.items()}
            return jnp.sum(self.loss(self.train(_nest(nested), x_B), y_B))

        leaves = {name: flatten_dict(params)[path] for path, name in self.names.items()}
        traced = jax.make_jaxpr(total)(leaves)
        used = used_inputs(traced.jaxpr)
        names = sorted(leaves)  # the order in which JAX flattens a dict
        unused = tuple(name for name, is_used in zip(names, used, strict=True) if not is_used)
        value = "a model whose outputs do not depend on its parameters"
        require(len(unused) < len(names), "module", value, "at least one parameter with a gradient", "nn.Dense(1)")
        return unused

    def _warn_of_mode(self) -> tuple[str, ...]:
        names = () if isinstance(self.module, tuple) else inspect.signature(self.module.__call__).parameters
        modes = [name for name in MODES if name in names]
        if not modes or "train" in names:
            return ()
        return (
            f"module has the argument {modes[0]}, which keeps its default in training; the trainer sets only train",
        )


def _nest(leaves: Mapping[tuple[str, ...], Any]) -> Any:
    nested: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = nested
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return nested


def used_inputs(jaxpr: Any) -> list[bool]:
    """Return for each input of a traced program whether the result has a gradient for it."""
    live = {variable for variable in jaxpr.outvars if not hasattr(variable, "val")}
    for equation in reversed(jaxpr.eqns):
        passes = equation.primitive.name != "stop_gradient"
        if passes and any(variable in live for variable in equation.outvars):
            live |= {variable for variable in equation.invars if not hasattr(variable, "val")}
    return [variable in live for variable in jaxpr.invars]


def last_layer(traced: Any) -> str:
    """Return ``Sigmoid`` or ``Softmax`` if a traced program ends in it, else an empty string."""
    jaxpr = traced.jaxpr
    producers = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
    last = None if hasattr(jaxpr.outvars[0], "val") else producers.get(jaxpr.outvars[0])
    if last is None:
        return ""
    if last.primitive.name == "logistic":
        return "Sigmoid"
    above = last.invars[0]
    numerator = None if hasattr(above, "val") else producers.get(above)
    is_softmax = last.primitive.name == "div" and numerator is not None and numerator.primitive.name == "exp"
    return "Softmax" if is_softmax else ""


def _inputs(examples: Examples) -> Any:
    """Return the inputs of examples as arrays of JAX."""
    return map_inputs(jnp.asarray, split_inputs(examples.x))


def _explain(error: Exception, module: Any, x_B: Any, form: Any) -> SettingError:
    """Return the error for a model that fails, with a repair of common mistakes."""
    value = f"a model that fails on inputs {describe_inputs(x_B)} ({cause_of(error)})"
    return SettingError(
        "module", value, f"a model that accepts x of {describe_inputs(x_B)}", _repair(error, module, x_B, form)
    )


def _repair(error: Exception, module: Any, x_B: Any, form: Any) -> str:
    text = str(error)
    shape, expected = (jax.tree.map(lambda part: tuple(part.shape[1:]), tree) for tree in (x_B, form))
    if form is not None and shape != expected:
        return f"input_shape={shape}"
    if not isinstance(x_B, jax.Array | jax.ShapeDtypeStruct) and isinstance(error, TypeError):
        return f"x with {takes(module)}, or forward=lambda module, inputs: module(...)"
    if isinstance(error, jax.errors.ConcretizationTypeError | jax.errors.TracerArrayConversionError):
        return "jnp.where in place of if, and jax.numpy in place of NumPy, float() and item()"
    if "immutable" in text:
        return "train: bool = False as an argument of __call__, and use_running_average=not train"
    if "integer" in text:
        return "x = x.astype('int32') as the first line of __call__"
    if "missing" in text and "argument" in text:
        return "train: bool = False as the only argument of __call__ besides x"
    return "the module on x[:1] in Python, which shows the whole error"
