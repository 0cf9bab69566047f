"""Check before the first private step that a PyTorch model treats each example alone.

Shapes: N examples, B batch, C outputs, D parameters.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedlearn.core.inputs import map_inputs, split_inputs
from fedlearn.core.records import Examples
from fedlearn.errors import SettingError
from fedlearn.trainers.example_check import TOLERANCE, Evaluated, agree, find_mixing, probe_examples, refuse
from fedlearn.trainers.torch.example_blame import describe_module, first_mixing_module
from fedlearn.trainers.torch.example_draws import ConstantDraws
from fedlearn.trainers.torch.losses import Loss
from fedlearn.trainers.torch.network import copy_of, first_of, rows_of, without_prefix

GPU_TOLERANCE = 0.02  # GPUs round products to 10 bits
MAX_CAUSE = 120  # characters of an error from a model
LEVELS = (0.1, 0.9, 0.3)  # quantiles of draws, because code can branch on a draw
PERTURBATION = 0.1  # standard deviation of the change of the parameters, so that a branch with zero weights counts


class Clipped(Protocol):
    """Part of `ClippedGradient` that the probe uses."""

    clip: float

    def _sums(self, x_B: torch.Tensor, y_B: torch.Tensor, keys_B: None, start: int) -> Any: ...


class ExampleProbe:
    """Check a model and a loss on a few examples.

    Args:
        module: the model, in training mode.
        loss: ``(outputs_BC, y_B) -> loss_B``.
        leaves: the trained parameters.

    Attributes:
        has_draws: whether the model draws random numbers.
        has_unknown_draws: whether an operation draws that `ExampleDraws` cannot divide among examples.
    """

    def __init__(self, module: nn.Module, loss: Loss, leaves: Sequence[nn.Parameter]) -> None:
        self.module, self.loss, self.leaves = module, loss, list(leaves)
        self.has_draws = self.has_unknown_draws = False
        self._groups: list[tuple[Any, torch.Tensor]] = []

    def check(self, x_N: Any, y_N: torch.Tensor, *, synthetic: bool) -> None:
        """Check the model on examples of a client.

        Raises:
            SettingError: DP-SGD cannot protect single examples with this model.
        """
        examples = _examples(x_N, y_N)
        groups = [
            (_tensors(g.x, y_N.device), torch.from_numpy(g.y).to(y_N.device))
            for g in probe_examples(examples, synthetic=synthetic)
        ]
        with self._restored():
            with refused_modules(self.module):
                self._check_state(*groups[0])
            self._groups = [group for number, group in enumerate(groups) if self._runs(*group, must=number == 0)]
            self._perturb()
            for group, level in zip(self._groups, LEVELS, strict=False):
                self._check_mixing(*group, level)

    def agrees(self, clipped: Clipped) -> bool:
        """Return whether the sums of clipped gradients equal the sums from a loop over the examples."""
        clip, tolerance = clipped.clip, self._tolerance(self._groups[0][1])
        try:
            with self._restored():
                first = self._agrees_on(clipped, *self._groups[0], tolerance)
                self._perturb()
                return first and self._agrees_on(clipped, *self._groups[min(1, len(self._groups) - 1)], tolerance)
        finally:
            clipped.clip = clip

    def _agrees_on(self, clipped: Clipped, x_N: Any, y_N: torch.Tensor, tolerance: float) -> bool:
        alone = [self._evaluate(rows_of(x_N, slice(n, n + 1)), y_N[n : n + 1]).gradient_D for n in range(len(y_N))]
        gradients = [g for g in alone if g is not None and np.isfinite(g).all()]
        norms = [float(np.linalg.norm(g)) for g in gradients]
        clipped.clip = float(np.median(norms or [1.0])) or 1.0  # clips some of the gradients
        factors = [min(1.0, clipped.clip / max(norm, 1e-30)) for norm in norms]
        with ConstantDraws(), torch.no_grad():
            sums, _ = clipped._sums(copy_of(x_N), y_N, None, 0)
        expected_D = np.sum([f * g for f, g in zip(factors, gradients, strict=True)], axis=0)
        return not gradients or agree(_flat(sums), expected_D, tolerance, scale=float(np.abs(gradients[0]).max()))

    def _check_mixing(self, x_N: Any, y_N: torch.Tensor, level: float = 0.5) -> None:
        if self.has_unknown_draws:  # results would differ between runs
            return

        # this option scales gradients by the batch; the gradient of an example alone is well defined
        scaled = any(getattr(part, "scale_grad_by_freq", False) for part in self.module.modules())

        def evaluate(x: np.ndarray, y: np.ndarray) -> Evaluated:
            evaluated = self._evaluate(_tensors(x, y_N.device), torch.from_numpy(y).to(y_N.device), level)
            return evaluated._replace(gradient_D=None) if scaled else evaluated

        part = find_mixing(evaluate, _examples(x_N, y_N), tolerance=self._tolerance(y_N))
        if not part:
            return
        with ConstantDraws(level):
            name = first_mixing_module(self.module, x_N)
        if name or part == "outputs":
            raise refuse(f"{name or self._name} mixes the examples of a batch")
        raise refuse(f"the {part} of the examples depend on each other")

    def _check_state(self, x_N: Any, y_N: torch.Tensor) -> None:
        """Refuse a model whose forward pass changes it, or draws numbers outside torch's generator."""
        generators = _generators()
        first = self._outputs(rows_of(x_N, slice(0, 1)))
        before = _state(self.module)
        self._outputs(rows_of(x_N, slice(1, 2)))
        changed = [name for name, value in _state(self.module).items() if not _equal(value, before.get(name))]
        if changed:
            raise refuse(f"a forward pass changes {changed[0]}")
        again = self._outputs(rows_of(x_N, slice(0, 1)))
        if generators != _generators() or not agree(first, again):
            raise refuse(f"{self._name} draws random numbers outside torch's generator")

    def _outputs(self, x_B: Any) -> np.ndarray:
        torch.manual_seed(1)
        try:
            with torch.no_grad():
                return _numpy(self.module(copy_of(x_B)))
        except SettingError:
            raise
        except Exception as error:
            raise self._failure(len(first_of(x_B)), error) from error

    def _runs(self, x_N: Any, y_N: torch.Tensor, *, must: bool) -> bool:
        """Return whether the model accepts a group of examples."""
        try:
            for rows in (slice(0, 1), slice(0, 2)):
                self._evaluate(rows_of(x_N, rows), y_N[rows])
        except SettingError:
            raise
        except Exception as error:
            if must:
                raise self._failure(rows.stop, error) from error
            return False
        return True

    def _failure(self, size: int, error: Exception) -> SettingError:
        cause = str(error).split("\n")[0][:MAX_CAUSE]
        return refuse(f"{self._name} fails on a batch of {size} ({cause})")

    def _evaluate(self, x_B: Any, y_B: torch.Tensor, level: float = 0.5) -> Evaluated:
        """Run a batch, with each draw at a fixed quantile of its distribution."""
        with ConstantDraws(level) as draws, torch.enable_grad():
            outputs = self.module(copy_of(x_B))  # the model may change its inputs
            loss_B = self.loss(outputs, y_B)
            if loss_B.shape != (len(y_B),):
                raise refuse(f"the loss has the shape {tuple(loss_B.shape)} for a batch of {len(y_B)}")
            gradients = torch.autograd.grad(loss_B.sum(), self.leaves, materialize_grads=True)
        self.has_draws |= draws.has_drawn
        self.has_unknown_draws |= bool(draws.unknown)
        return Evaluated(_numpy(outputs), _numpy(loss_B), _flat(gradients))

    @property
    def _name(self) -> str:
        return describe_module("", self.module)

    def _tolerance(self, tensor: torch.Tensor) -> float:
        return TOLERANCE if tensor.device.type == "cpu" else GPU_TOLERANCE

    def _perturb(self) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for leaf in self.leaves:
                size = PERTURBATION * (leaf.square().mean().sqrt() + PERTURBATION)
                leaf.add_(size * torch.randn(leaf.shape, generator=generator).to(leaf))

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Restore parameters and buffers after a block of code."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        values = [tensor.detach().clone() for tensor in tensors]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)


@contextmanager
def refused_modules(module: nn.Module) -> Iterator[None]:
    """Refuse modules by their class when a forward pass calls them.

    Raises:
        SettingError: A module uses batch statistics, or a forward pass changes its weights.
    """

    def refuse_call(reason: str, part: nn.Module, inputs: Any) -> None:
        raise refuse(reason)

    faults = {part: _fault(describe_module(name, part), part) for name, part in module.named_modules()}
    hooks = [p.register_forward_pre_hook(partial(refuse_call, fault)) for p, fault in faults.items() if fault]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fault(name: str, part: nn.Module) -> str:
    if isinstance(part, _BatchNorm):
        return f"{name} normalizes with statistics of the batch"
    if isinstance(part, _InstanceNorm) and part.track_running_stats:
        return f"{name} collects statistics of all examples"
    if getattr(part, "max_norm", None) is not None:
        return f"{name} has max_norm, so a forward pass changes its weight"
    return ""


def _generators() -> tuple[Any, ...]:
    """Return the states of the global generators of Python and NumPy."""
    state: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), state[1].tobytes(), state[2]


def _state(module: nn.Module) -> dict[str, Any]:
    """Return all values of a module that a forward pass could change, by name."""
    values: dict[str, Any] = {}
    for path, part in module.named_modules():
        attributes = {**part._parameters, **part._buffers, **{k: v for k, v in vars(part).items() if k not in INTERNAL}}
        owner = without_prefix(path) or describe_module("", part)
        values |= {f"{owner}.{name}": _snapshot(value) for name, value in attributes.items()}
    return values


INTERNAL = {"training", *vars(nn.Module())}


def _snapshot(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, str | int | float | bool | None):
        return value
    return len(value) if isinstance(value, Sized) else type(value)


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and value.shape == other.shape and bool((value == other).all())
    return bool(np.array_equal(value, other)) if isinstance(value, np.ndarray) else value == other


def _numpy(values: Any) -> np.ndarray:
    """Return a tensor as an array, or an empty array for outputs that are no tensor."""
    if not isinstance(values, torch.Tensor):
        return np.zeros(0)
    return np.asarray(values.detach().to_dense().float().cpu().numpy())


def _tensors(x_N: np.ndarray, device: torch.device) -> Any:
    """Return inputs of examples as tensors."""
    return map_inputs(lambda part: torch.from_numpy(np.ascontiguousarray(part)).to(device), split_inputs(x_N))


def _examples(x_N: Any, y_N: torch.Tensor) -> Examples:
    """Return tensors of inputs and targets as examples."""
    return Examples(map_inputs(lambda part: part.cpu().numpy(), x_N), y_N.cpu().numpy())


def _flat(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    return np.concatenate([_numpy(tensor).ravel() for tensor in tensors])
