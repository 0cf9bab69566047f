"""Prepare a PyTorch module for training, and check it on a few examples.

Shapes: N examples, B batch, C outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from fedlearn.core.inputs import describe_inputs, input_arrays, map_inputs, split_inputs
from fedlearn.core.model_report import ModelReport, ModelWarning
from fedlearn.core.records import Examples
from fedlearn.core.tasks import Task
from fedlearn.errors import SettingError, require
from fedlearn.trainers.contract import (
    Remedies,
    are_finite,
    cause_of,
    list_names,
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
from fedlearn.trainers.torch.compat import without_compiler
from fedlearn.trainers.torch.network import Forward, Network, Trim, copy_of, first_of, rows_of, without_prefix
from fedlearn.trainers.torch.random import restored_generators

LARGE = 30.0  # factor of large inputs, for which logits leave [0, 1]
REMEDIES = Remedies(
    head="nn.Linear({inputs}, {outputs})",
    as_column="nn.Sequential(module, nn.Unflatten(0, (-1, 1)))",
    as_float="outputs.float() at the end of forward",
)
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (outputs_BC, y_B) -> loss_B


def prepare_module(
    module: Any,
    *,
    input_shape: tuple[int, ...] | None,
    forward: Forward | None,
    output: str | int | None,
    trim: Trim | None = None,
) -> Network:
    """Return a network that a trainer accepts, in float32 and with the shapes of all parameters.

    The module of the user does not change. ``torch.compile`` and ``DataParallel`` are removed, because a trainer runs
    the module in its own way. Lazy layers get their shapes from one pass of zeros.

    Args:
        module: module of a user.
        input_shape: shape of one example, for lazy layers; None if it is not known.
        forward: runs the module, see `Network`.
        output: part of the result that holds the outputs, see `Network`.
        trim: removes padding, see `Network`.

    Raises:
        SettingError: The argument is no module, or has parameters of an unknown shape or of a wrong type.
    """
    if isinstance(module, type):
        raise SettingError("module", f"the class {module.__name__}", "an object", f"{module.__name__}()")
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    fix = "JaxTrainer(module)" if kind.partition(".")[0] in ("flax", "equinox") else "nn.Linear(6, 1)"
    require(isinstance(module, nn.Module), "module", f"a {kind}", "a torch.nn.Module", fix)
    require(forward is None or callable(forward), "forward", forward, "a function (module, inputs)", "forward=None")
    module = without_compiler(_copy_of_module(module))
    _materialise(module, input_shape)
    _require_float32(module)
    return Network(module, forward, output, trim)


def _copy_of_module(module: nn.Module) -> nn.Module:
    """Return a copy, so that training changes no module of the user. Two trainers of one module do not share weights.

    The copy shares frozen parameters, which training never changes. So a large frozen model is in memory once. Some
    modules cannot be copied, e.g. with ``torch.nn.utils.weight_norm``, or with a ``forward`` that was assigned to an
    object and calls its layers. Training changes such a module itself.
    """
    if any("forward" in vars(each) for each in module.modules()):
        return module
    try:
        frozen = [each for each in module.parameters() if not each.requires_grad and each.dtype == torch.float32]
        return deepcopy(module, {id(each): each for each in frozen})
    except Exception:  # a module may contain any object
        return module


def _materialise(module: nn.Module, input_shape: tuple[int, ...] | None) -> None:
    """Give lazy layers their shapes."""
    tensors = [*module.parameters(), *module.buffers()]
    if not any(is_lazy(tensor) for tensor in tensors):
        return
    names = [name for name, part in module.named_modules() if isinstance(part, LazyModuleMixin)]
    value, expected = f"a model with lazy layers ({list_names(names)})", "layers with shapes"
    if input_shape is None:
        raise SettingError("module", value, expected, "module(torch.from_numpy(x[:1])) before TorchTrainer(module)")
    training = module.training
    try:
        with torch.no_grad():
            module.eval()
            try:
                module(torch.zeros(1, *input_shape))
            except Exception:  # the first layer can be an embedding
                module(torch.zeros(1, *input_shape, dtype=torch.long))
    except Exception as error:
        value = f"{value[:-1]}; {cause_of(error)})"
        raise SettingError(
            "module", value, f"layers that accept x of shape {(1, *input_shape)}", "nn.Flatten()"
        ) from error
    finally:
        module.train(training)


def _require_float32(module: nn.Module) -> None:
    """Cast float64, bfloat16 and float16 to float32, with a warning. Refuse other types of trained parameters."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, parameter in module.named_parameters():
        ok = parameter.is_floating_point() or not parameter.requires_grad
        value = f"a model with the parameter {name} in {_type(parameter)}"
        require(ok, "module", value, "parameters in float32", f"module.{name}.requires_grad_(False)")
        is_dense = parameter.layout is torch.strided
        require(is_dense, "module", f"a model with the sparse parameter {name}", "dense parameters", "to_dense()")
    others = {_type(t) for _, t in tensors if t.is_floating_point() and t.dtype != torch.float32}
    if others:
        text = f"module has parameters in {', '.join(sorted(others))}; the trainer changes them to float32"
        warnings.warn(text, ModelWarning, stacklevel=4)
        module.float()


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass
class ModuleCheck:
    """Run a module and its loss on a few examples of a client.

    Args:
        module: the network.
        task: the task.
        loss: ``(outputs_BC, y_B) -> loss_B``.
        has_custom_loss: whether the loss is not the loss of the task.
        leaves: trained parameters by name.
        frozen: names of the other parameters.
        device: device of the module.

    Attributes:
        needs_two_examples: whether the module fails on a batch with one example.
    """

    module: nn.Module
    task: Task
    loss: Loss
    has_custom_loss: bool
    leaves: dict[str, nn.Parameter]
    frozen: tuple[str, ...]
    device: str
    needs_two_examples: bool = False
    _warnings: list[str] = field(default_factory=list)

    def check(self, examples: Examples, *, synthetic: bool) -> ModelReport:
        """Check types, shapes, values and gradients.

        Args:
            examples: examples of a client.
            synthetic: whether the inputs are random numbers, so that the result does not depend on the data.

        Raises:
            SettingError: The module or its loss does not fit.
        """
        require_inputs(examples)
        fix = "module.requires_grad_(True)" if self.frozen else "a model with a layer, such as nn.Linear"
        require_parameters(len(self.leaves), self.frozen, fix=fix)
        few = probe_rows(examples, synthetic=synthetic)
        x = map_inputs(lambda part: torch.as_tensor(np.array(part), device=self.device), split_inputs(few.x))
        with self._restored():
            self.module.eval()
            outputs_NC = self._outputs(x, "eval")
            num_outputs = outputs_NC.shape[self.task.class_axis]
            if not synthetic:  # a refusal of a real client must not depend on its targets
                require_targets(examples, self.task, num_outputs, self._remedies(outputs_NC))
            require_finite_outputs(_array(outputs_NC))
            self.module.train()
            targets = within_classes(few.y, self.task, num_outputs)
            unused = self._check_gradients(x, torch.as_tensor(np.array(targets), device=self.device))
            self._check_one_example(x)
            self.module.eval()
            self._warnings += warn_of_probabilities(self._range(x, outputs_NC), self.task, self._last_layer(x))
        return ModelReport(
            num_outputs=num_outputs,
            unused=unused,
            frozen=self.frozen,
            warnings=(*self._warnings, *warn_of_unused(unused)),
        )

    def _outputs(self, x_B: Any, mode: str) -> torch.Tensor:
        """Return outputs ``(B, C)``, after checks of their structure, shape and type."""
        given = copy_of(x_B)
        outputs = run_module(self.module, given)
        if not isinstance(outputs, torch.Tensor):
            raise refuse_structure(outputs)
        pairs = zip(input_arrays(given), input_arrays(x_B), strict=True)
        same = all(torch.equal(torch.nan_to_num(new), torch.nan_to_num(old)) for new, old in pairs)
        fix = "x = x.clone() as the first line of forward"
        require(same, "module", "a model that changes its inputs in place", "a model that leaves x unchanged", fix)
        if outputs.layout is not torch.strided:
            raise SettingError("module", "a model with sparse outputs", "dense outputs", "outputs.to_dense()")
        require_outputs(
            outputs.shape,
            _type(outputs),
            num_examples=len(first_of(x_B)),
            task=self.task,
            has_custom_loss=self.has_custom_loss,
            remedies=self._remedies(outputs),
        )
        return outputs

    def _remedies(self, outputs: torch.Tensor) -> Remedies:
        """Return the remedies, with the width of the last linear layer."""
        layers = [part for part in self.module.modules() if isinstance(part, nn.Linear)]
        if layers and outputs.ndim > 1 and layers[-1].out_features == outputs.shape[-1]:
            head = f"nn.Linear({layers[-1].in_features}, {{outputs}})"
            return Remedies(head=head, as_column=REMEDIES.as_column, as_float=REMEDIES.as_float)
        return REMEDIES

    def _check_gradients(self, x_B: Any, y_B: torch.Tensor) -> tuple[str, ...]:
        """Return the names of the parameters that get no gradient in training."""
        with torch.enable_grad():
            outputs_BC = self._outputs(x_B, "train")
            loss_B = self._losses(outputs_BC, y_B)
            value = "a model whose outputs have no gradient"
            expected = "outputs that autograd can differentiate"
            fix = "forward without detach(), no_grad(), item() and NumPy"
            require(outputs_BC.requires_grad, "module", value, expected, fix)
            value, expected = "a function whose result has no gradient", "a loss that autograd can differentiate"
            require(loss_B.requires_grad, "loss", value, expected, fix.replace("forward", "a loss"))
            try:
                gradients = torch.autograd.grad(loss_B.sum(), list(self.leaves.values()), allow_unused=True)
            except Exception as error:
                raise SettingError("module", f"a model without gradients ({cause_of(error)})", expected, fix) from error
        unused = tuple(name for name, g in zip(self.leaves, gradients, strict=True) if g is None)
        reaches = len(unused) < len(self.leaves)
        value = "a model whose outputs do not depend on its trainable parameters"
        require(reaches, "module", value, "at least one parameter with a gradient", "module.requires_grad_(True)")
        return unused

    def _losses(self, outputs_BC: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        """Return one loss per example."""
        try:
            loss_B = self.loss(outputs_BC, y_B)
        except SettingError:
            raise
        except Exception as error:
            shapes = f"outputs {tuple(outputs_BC.shape)}", f"targets {tuple(y_B.shape)} of {_type(y_B)}"
            raise refuse_failing_loss(self.loss, *shapes, error) from error
        is_tensor = isinstance(loss_B, torch.Tensor)
        shape, kind = (tuple(loss_B.shape), "") if is_tensor else (None, f"a {type(loss_B).__name__}")
        finite = not is_tensor or are_finite(_array(loss_B), _array(outputs_BC))
        require_loss(self.loss, shape, num_examples=len(y_B), finite=finite, kind=kind)
        return loss_B

    def _check_one_example(self, x_B: Any) -> None:
        """Warn about a module that fails on a batch of one example, such as a batch norm."""
        try:
            with torch.no_grad():
                self.module(copy_of(rows_of(x_B, slice(0, 1))))
        except Exception as error:
            self.needs_two_examples = True
            norms = [
                f"{without_prefix(name)} ({type(p).__name__})"
                for name, p in self.module.named_modules()
                if isinstance(p, _BatchNorm)
            ]
            layer = f", because of {norms[0]}" if norms else ""
            self._warnings.append(
                f"module fails on a batch with one example{layer} ({cause_of(error)}). A client whose last batch has "
                "one example cannot train. Try group norm, or another local.batch_size."
            )

    def _range(self, x_B: Any, outputs_BC: torch.Tensor) -> np.ndarray:
        """Return outputs for the examples and for large inputs; empty if no input can be large."""
        if not any(part.is_floating_point() for part in input_arrays(x_B)):
            return _array(outputs_BC)[:0]
        try:
            with torch.no_grad():
                large_BC = self.module(map_inputs(lambda part: LARGE * part if part.is_floating_point() else part, x_B))
        except Exception:  # large inputs can be no valid codes
            return _array(outputs_BC)
        return np.concatenate([_array(outputs_BC), _array(large_BC)])

    def _last_layer(self, x_B: Any) -> str:
        """Return the class of the module that returned the outputs; empty if no module did."""
        results: list[tuple[int, str]] = []

        def record(part: nn.Module, inputs: Any, outputs: Any) -> None:
            if isinstance(outputs, torch.Tensor):
                kept.append(outputs)
                results.append((id(outputs), type(part).__name__))

        kept: list[torch.Tensor] = []  # keeps identities unique
        parts = [part for part in self.module.modules() if not isinstance(part, torch.jit.ScriptModule)]
        parts = [part for part in parts if not list(part.children())]
        with _hooks(part.register_forward_hook(record) for part in parts), torch.no_grad():
            outputs = self.module(copy_of(x_B))
        return next((name for number, name in reversed(results) if number == id(outputs)), "")

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Restore mode, buffers and random generators after a block of code."""
        training = [(part, part.training) for part in self.module.modules()]
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.module.buffers()]
        try:
            with restored_generators(self.device), torch.no_grad():
                torch.manual_seed(0)
                yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for part, mode in training:
                part.training = mode


@contextmanager
def _hooks(handles: Iterator[Any]) -> Iterator[None]:
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().float().cpu().numpy())


def run_module(module: nn.Module, x_B: Any) -> Any:
    """Return the result of a module.

    Raises:
        SettingError: The module fails. The error names the layer and its inputs.
    """
    active: list[tuple[str, nn.Module, Any]] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda part, inputs: active.append((name, part, inputs[0] if inputs else None))

    def leave(part: nn.Module, inputs: Any, outputs: Any) -> None:
        if active and active[-1][1] is part:
            active.pop()

    handles = []
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):  # such a module accepts no hooks
            continue
        handles += [part.register_forward_pre_hook(enter(name)), part.register_forward_hook(leave)]
    try:
        with _hooks(iter(handles)):
            return module(x_B)
    except SettingError:
        raise
    except Exception as error:
        name, part, inputs = active[-1] if active else ("", module, x_B)
        part = part.inner if isinstance(part, Network) else part
        inputs = inputs if isinstance(inputs, torch.Tensor) else x_B
        raise _explain(without_prefix(name), part, inputs, x_B, error) from error


def _explain(name: str, part: nn.Module, inputs: Any, x_B: Any, error: Exception) -> SettingError:
    """Return the error for a layer that fails, with a repair of common mistakes."""
    layer = f"{name} ({type(part).__name__})" if name else type(part).__name__
    value = f"a model whose layer {layer} fails on inputs {describe_inputs(inputs)} ({cause_of(error)})"
    expected = f"layers that accept x of {describe_inputs(x_B)}"
    return SettingError("module", value, expected, _repair(name, part, inputs, x_B))


def _repair(name: str, part: nn.Module, inputs: Any, x_B: Any) -> str:
    if not isinstance(inputs, torch.Tensor):
        return f"x with {takes(part.forward)}, or forward=lambda module, inputs: module(...)"
    width = inputs.shape[-1] if inputs.ndim else 0
    if isinstance(part, nn.Embedding | nn.EmbeddingBag) and inputs.is_floating_point():
        return "x = x.long() as the first line of forward"
    if (
        not inputs.is_floating_point()
        and isinstance(x_B, torch.Tensor)
        and not isinstance(part, nn.Embedding | nn.EmbeddingBag)
    ):
        return "x.astype('float32') for the data, or x = x.float() as the first line of forward"
    if isinstance(part, nn.Linear) and math.prod(inputs.shape[1:]) == part.in_features:
        return "nn.Sequential(nn.Flatten(), module)"
    if isinstance(part, nn.Linear) and width != part.in_features:
        return f"nn.Linear({width}, {part.out_features}) for {name or 'module'}"
    if isinstance(part, _ConvNd) and inputs.ndim > 2 and width == part.in_channels:
        return "x = x.movedim(-1, 1) as the first line of forward, because images are (B, H, W, C)"
    if isinstance(part, _ConvNd) and inputs.ndim > 2:
        return f"in_channels={width} for {name or 'module'}, and x = x.movedim(-1, 1) as the first line of forward"
    return "module(torch.from_numpy(x[:5])) in Python, which shows the whole error"
