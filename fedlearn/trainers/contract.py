"""Contract between a trainer, its model, its loss and its examples, for every framework.

A trainer runs its model and its loss on a few examples before the first step. The functions of this module check the
results. Each error names the argument that is wrong: ``module``, ``loss``, ``task``, ``x`` or ``y``.

Shapes: N examples, B batch, C outputs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.inputs import input_arrays
from fedlearn.core.model_report import ModelReport, ModelWarning
from fedlearn.core.records import Examples
from fedlearn.core.tasks import Task
from fedlearn.errors import DataError, FedlearnError, SettingError, require
from fedlearn.loop.protocols import Trainer
from fedlearn.trainers.example_check import NUM_EXAMPLES, finite_inputs, probe_examples

INPUT_TYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")
ARGUMENTS = ("module", "loss", "output", "x", "y")  # names in errors, which are no settings of a command
LARGEST_USUAL_OUTPUT = 1e6
SMALLEST_RANGE = 1e-6
MAX_CAUSE = 160  # characters of an error from the code of a user
MAX_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """Code that repairs a model in one framework, for error texts.

    Args:
        head: pattern of the last layer, e.g. ``nn.Linear({inputs}, {outputs})``.
        as_column: expression that turns outputs ``(B,)`` into ``(B, 1)``.
        as_float: expression that turns outputs into float32.
    """

    head: str
    as_column: str
    as_float: str

    def new_head(self, num_outputs: int, num_inputs: int | None = None) -> str:
        """Return a last layer with this number of outputs."""
        return self.head.format(inputs=num_inputs or "...", outputs=num_outputs) + " as the last layer"


def check_data(trainer: Trainer, data: FederatedData, *, num_classes: int | None = None) -> ModelReport:
    """Check the model of a trainer on examples of the first client with data.

    Args:
        trainer: the trainer.
        data: examples of the clients.
        num_classes: number of outputs that the model must have; None if only the labels in the data count.

    Raises:
        SettingError: The model or its loss does not fit the data. The error names the wrong argument.
    """
    for client in data.clients:
        examples = data.train(client)
        if len(examples):
            report = _check_classes(trainer.check_model(examples), data, num_classes)
            return replace(report, warnings=(*report.warnings, *_warn_of_nan(examples, data.name(client))))
    return ModelReport()


def _warn_of_nan(examples: Examples, client: str) -> tuple[str, ...]:
    """Return a warning if the inputs of a client have NaN or infinity, which most models do not accept."""
    if all(x.dtype.kind != "f" or np.isfinite(x).all() for x in input_arrays(np.asarray(examples.x))):
        return ()
    return (f"x of client {client} has NaN or infinity, so most models cannot train. Try numpy.nan_to_num(x).",)


def _check_classes(report: ModelReport, data: FederatedData, num_classes: int | None) -> ModelReport:
    if not report.num_outputs or not has_output_per_class(data.task):
        return report
    needed, actual = data.task.num_outputs(num_classes or data.num_classes), report.num_outputs
    expected = f"{needed} outputs, because the data have {needed} classes"
    fits = actual == needed or (actual > needed and num_classes is None and data.task.has_classes)
    require(fits, "module", f"a model with {actual} outputs", expected, f"a last layer with {needed} outputs")
    return report


def has_output_per_class(task: Task) -> bool:
    """Return whether the number of outputs of a model depends on the number of classes."""
    return task.num_outputs(2) != task.num_outputs(3)


def warn_about(report: ModelReport, *, stacklevel: int = 3) -> None:
    """Issue a Python warning for each sentence of a report."""
    for text in report.warnings:
        warnings.warn(text, ModelWarning, stacklevel=stacklevel)


def kind_of(examples: Examples) -> tuple[Any, ...]:
    """Return shape and type of single examples. Examples of one kind need one check."""
    x, y = examples.x, examples.y
    return np.shape(x)[1:], str(x.dtype), np.shape(y)[1:], str(y.dtype)


def within_classes(y: np.ndarray, task: Task, num_outputs: int) -> np.ndarray:
    """Return targets for which the loss of a task exists with this number of outputs."""
    return np.minimum(y, num_outputs - 1) if task.has_classes and has_output_per_class(task) else y


def probe_rows(examples: Examples, *, synthetic: bool) -> Examples:
    """Return five finite examples of a client, repeated if there are fewer.

    Args:
        examples: examples of a client, at least one.
        synthetic: whether the inputs are random numbers in the range of the client's data.
    """
    if synthetic:
        return next(probe_examples(examples, synthetic=True))
    rows = np.arange(NUM_EXAMPLES) % len(examples)
    return Examples(finite_inputs(np.asarray(examples.x)[rows]), np.asarray(examples.y)[rows])


def require_inputs(examples: Examples) -> None:
    """Require inputs of a type that every trainer accepts, and one finite target per example."""
    x, y = np.asarray(examples.x), np.asarray(examples.y)
    for part in input_arrays(x):
        types = f"an array of float32 or of whole numbers, not of {part.dtype}"
        require(part.dtype.name in INPUT_TYPES, "x", f"an array of {part.dtype}", types, "x.astype('float32')")
    require(x.ndim >= 1, "x", "a single number", "an array with one row per example", "x[None]")
    is_number = y.dtype.kind in "fiub"
    require(is_number, "y", f"an array of {y.dtype}", "an array of numbers", "numpy.unique(y, return_inverse=True)[1]")


def require_targets(examples: Examples, task: Task, num_outputs: int, remedies: Remedies) -> None:
    """Require targets that fit the task and the number of outputs."""
    y = np.asarray(examples.y)
    if task.has_classes and y.ndim > task.example_arrays(2)[1].ndim:  # a class for each position; -1 is padding
        y = y[y >= 0]
    fix = "task='multiclass'" if task.name == "binary" else "a target column for this task"
    try:
        targets = task.targets(y)
    except DataError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        value, expected = f"an array that does not fit the task {task}", f"targets for this task: {'; '.join(lines)}"
        raise SettingError("y", value, expected, fix) from error
    expected = "finite targets"
    is_finite = bool(np.isfinite(np.asarray(targets, np.float64)).all())
    require(is_finite, "y", "an array with NaN or infinity", expected, "y[numpy.isfinite(y)]")
    if not has_output_per_class(task):
        return
    needed = task.num_outputs(task.count_classes(targets))
    expected = f"at least {needed} outputs, because y has the class {needed - 1}"
    if not task.has_classes:
        expected = f"{needed} outputs, because y has {needed} columns"
    fits = num_outputs == needed or (task.has_classes and num_outputs > needed)
    require(fits, "module", f"a model with {num_outputs} outputs", expected, remedies.new_head(needed))


def refuse_structure(outputs: Any) -> SettingError:
    """Return the error for outputs that are no array, such as a tuple or a dict."""
    if isinstance(outputs, Mapping):
        keys = [str(key) for key in outputs]
        key = next((k for k in ("logits", "out", "output", "outputs", "prediction") if k in keys), [*keys, "logits"][0])
        value, part = f"a model that returns a dict with the keys {', '.join(keys)}", repr(key)
    elif is_dataclass(outputs) or hasattr(outputs, "_fields"):
        names = list(getattr(outputs, "__dataclass_fields__", None) or outputs._fields)
        key = "logits" if "logits" in names else names[0]
        value, part = f"a model that returns a {type(outputs).__name__}", repr(key)
    elif isinstance(outputs, tuple | list):
        value, part = f"a model that returns a {type(outputs).__name__} of {len(outputs)}", "0"
    else:
        value, part = f"a model that returns {type(outputs).__name__}", ""
    fix = f"output={part}, or forward=lambda module, inputs: module(inputs)[...]" if part else "return outputs"
    return SettingError("module", value, "a model that returns one array (B, C)", fix)


def select_output(outputs: Any, key: str | int) -> Any:
    """Return the array of a model that returns a dict, a tuple or a dataclass.

    Args:
        outputs: result of the model.
        key: key of a dict, position in a tuple, or name of an attribute.

    Raises:
        SettingError: The result has no such part.
    """
    try:
        if isinstance(outputs, Mapping):
            return outputs[key]
        if isinstance(key, int) and isinstance(outputs, tuple | list):
            return outputs[key]
        return getattr(outputs, str(key))
    except (KeyError, IndexError, AttributeError) as error:
        keys = list(outputs) if isinstance(outputs, Mapping) else []
        names = [*keys, *getattr(outputs, "_fields", ()), *getattr(outputs, "__dataclass_fields__", ())]
        expected = f"one of {', '.join(map(str, names))}" if names else "a part of the outputs of the model"
        raise SettingError("output", key, expected, f"output={names[0]!r}" if names else "output=0") from error


def choose_output(outputs: Any) -> Any:
    """Return the part ``logits`` of a dict or a dataclass, or the outputs themselves if there is no such part."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


def require_outputs(
    shape: Sequence[int], dtype: str, *, num_examples: int, task: Task, has_custom_loss: bool, remedies: Remedies
) -> None:
    """Require outputs in float32, with the axes and the number of outputs of the task."""
    shape, per_class = tuple(shape), has_output_per_class(task)
    axes = len(task.example_arrays(2)[0].shape)
    count = "one output per class" if per_class else f"{task.num_outputs(2)} output for the task {task}"
    letters = ", ".join([str(num_examples), *["..."] * (axes > 2), "C"])
    value, expected = f"a model with outputs of shape {shape}", f"shape ({letters}), with {count}"
    if shape == (num_examples,):
        raise SettingError("module", value, expected, remedies.as_column)
    keeps_rows = len(shape) > 0 and shape[0] == num_examples
    require(keeps_rows, "module", value, expected, "outputs that keep the first axis of x")
    fix = "outputs[:, -1] or outputs.mean(1) at the end of the model" if axes == 2 else "outputs with more axes"
    is_sequence = has_custom_loss and task.has_classes and len(shape) > axes  # a class for each position
    require(len(shape) == axes or is_sequence, "module", value, expected, fix)
    require(dtype == "float32", "module", f"a model with outputs in {dtype}", "float32 outputs", remedies.as_float)
    _require_num_outputs(shape[task.class_axis], task, has_custom_loss, remedies)


def _require_num_outputs(num_outputs: int, task: Task, has_custom_loss: bool, remedies: Remedies) -> None:
    value = f"a model with {num_outputs} output{'s' * (num_outputs != 1)}"
    if has_output_per_class(task):
        is_binary = task.name == "multiclass" and num_outputs == 1
        expected = "one output per class; two classes with one output are the task binary"
        require(not is_binary, "module", value, expected, f"{remedies.new_head(2)}, or task='binary'")
        return
    needed = task.num_outputs(2)
    expected = f"{needed} output{'s' * (needed != 1)} for the task {task}"
    also = ", or task='multiclass'" if task.name == "binary" and num_outputs == 2 else ""
    is_free = has_custom_loss and task.probabilities is None and num_outputs >= needed
    require(num_outputs == needed or is_free, "module", value, expected, remedies.new_head(needed) + also)


def require_finite_outputs(outputs_NC: np.ndarray) -> None:
    """Require finite outputs for some examples. An extreme input can have infinite outputs in any model."""
    value, expected = "a model with outputs that are NaN or infinite", "finite outputs for the initial weights"
    is_finite = bool(np.isfinite(outputs_NC).reshape(len(outputs_NC), -1).all(axis=1).any())
    require(is_finite, "module", value, expected, "smaller initial weights")


def are_finite(loss_N: np.ndarray, outputs_NC: np.ndarray) -> bool:
    """Return whether the losses of all examples with usual outputs are finite."""
    is_usual_N = (np.abs(outputs_NC) < LARGEST_USUAL_OUTPUT).reshape(len(outputs_NC), -1).all(axis=1)
    return loss_N.shape != is_usual_N.shape or bool(np.isfinite(loss_N[is_usual_N]).all())


def require_loss_function(loss: Any) -> None:
    """Require None or a function of outputs and targets."""
    if isinstance(loss, type):
        name = loss.__name__
        raise SettingError("loss", f"the class {name}", "an object or a function", f"loss={name}(reduction='none')")
    fits = loss is None or callable(loss)
    require(fits, "loss", loss, "a function (outputs_BC, y_B) -> loss_B", "loss=None for the loss of the task")


def require_loss(
    loss: Any, shape: Sequence[int] | None, *, num_examples: int, finite: bool = True, kind: str = ""
) -> None:
    """Require one finite loss per example.

    Args:
        loss: the loss function, for its name.
        shape: shape of its result; None if the result is no array.
        num_examples: number of examples, B.
        finite: whether all losses are finite.
        kind: type of the result, if it is no array.
    """
    name, expected = name_of(loss), f"one value per example, shape ({num_examples},)"
    if shape is None:
        raise SettingError("loss", f"{name}, which returns {kind}", expected, "loss=None for the loss of the task")
    shape, value = tuple(shape), f"{name}, which returns shape {tuple(shape)} for {num_examples} examples"
    if shape in ((), (1,)):
        raise SettingError("loss", value, expected, "reduction='none' in the loss, without mean() or sum()")
    if shape == (num_examples, 1):
        raise SettingError("loss", value, expected, "outputs[:, 0] in place of outputs in the loss")
    if len(shape) > 1 and shape[0] == num_examples:
        fix = "outputs[:, 0] in place of outputs, or mean(1) over the values of an example"
        raise SettingError("loss", value, expected, fix)
    require(shape == (num_examples,), "loss", value, expected, "loss=None for the loss of the task")
    value = f"{name}, which returns NaN or infinity for finite outputs"
    require(finite, "loss", value, "finite losses", "loss=None for the loss of the task")


def refuse_failing_loss(loss: Any, outputs: str, targets: str, error: Exception) -> SettingError:
    """Return the error for a loss that raises an exception."""
    value = f"{name_of(loss)}, which fails on {outputs} and {targets} ({cause_of(error)})"
    expected = "a function of outputs (B, C) and targets (B,) that returns one value per example"
    fix = "loss=None for the loss of the task, or outputs[:, 0] and y.float() in the loss"
    return SettingError("loss", value, expected, fix)


def takes(function: Any) -> str:
    """Return the names of the arguments of a model, for an error about several inputs."""
    call = function[1] if isinstance(function, tuple) else function
    names = [name for name in inspect.signature(call).parameters if name not in ("args", "kwargs", "train", "key")]
    return f"the names {', '.join(names[:8])}" if names else "one array"


def name_of(function: Any) -> str:
    """Return the name of a function, or of the class of a callable object."""
    return getattr(function, "__name__", type(function).__name__)


class TrainingError(FedlearnError):
    """Report a model that fails in the training of one client."""


def refuse_training(error: Exception, *, has_single_example: bool) -> TrainingError:
    """Return the error for a model that passed the check, but fails in training.

    Args:
        error: error of the model.
        has_single_example: whether the model needs two examples, and a batch of the client has only one.
    """
    expected, fix = "a model that accepts every batch of its client", "engine=serial, and run.log for the whole error"
    if has_single_example:
        expected = "a model that trains on a batch with one example"
        fix = "a model with group norm or layer norm in place of batch norm"
    value = f"a model that fails in training ({cause_of(error)})"
    return TrainingError(f"module is {value}\n  expected  {expected}\n  advice    {fix}")


def cause_of(error: BaseException) -> str:
    """Return type and first line of an error, shortened."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")[:MAX_CAUSE]


def require_parameters(num_trainable: int, frozen: Sequence[str], *, fix: str) -> None:
    """Require at least one trainable parameter."""
    value = "a model whose parameters are all frozen" if frozen else "a model without parameters"
    require(num_trainable > 0, "module", value, "at least one trainable parameter", fix)


def warn_of_probabilities(outputs_NC: np.ndarray, task: Task, last: str = "") -> tuple[str, ...]:
    """Return a warning if the outputs look like probabilities, because the losses expect logits.

    Args:
        outputs_NC: outputs for usual and for large inputs.
        task: the task.
        last: class of the layer that returned the outputs, if it is known.
    """
    if task.probabilities is None:
        return ()
    is_layer = last in ("Sigmoid", "Softmax", "Softmax2d", "Hardsigmoid")
    if not is_layer and not _look_like_probabilities(outputs_NC, task):
        return ()
    layer = f"the last layer {last}" if is_layer else "its last layer"
    return (
        "module returns probabilities, but the loss and the metrics expect logits; "
        f"training is slow and accuracy is wrong. Remove {layer}.",
    )


def _look_like_probabilities(outputs_NC: np.ndarray, task: Task) -> bool:
    """Return whether all outputs are in [0, 1], differ, and add up to 1 for one output per class."""
    if not len(outputs_NC) or outputs_NC.min() < 0 or outputs_NC.max() > 1 or np.ptp(outputs_NC) < SMALLEST_RANGE:
        return False
    sums = outputs_NC.sum(axis=task.class_axis)
    return not (task.has_classes and has_output_per_class(task)) or bool(np.allclose(sums, 1, atol=1e-4))


def warn_of_unused(names: Sequence[str]) -> tuple[str, ...]:
    """Return a warning about trainable parameters without a gradient."""
    if not names:
        return ()
    return (f"these parameters have no gradient, so they do not train: {list_names(names)}",)


def list_names(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
