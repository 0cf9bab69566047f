"""Find the module of a PyTorch model that mixes the examples of a batch.

Shapes: B batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from fedlearn.trainers.example_check import BATCHES, TOLERANCE
from fedlearn.trainers.torch.network import Network, rows_of, without_prefix


class _Event(NamedTuple):
    """Inputs or outputs of a call of a module."""

    name: str  # module that computed the values
    values: torch.Tensor


def describe_module(name: str, module: nn.Module) -> str:
    """Return name and class of a module, for an error."""
    name, module = without_prefix(name), module.inner if isinstance(module, Network) else module
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def first_mixing_module(module: nn.Module, x_N: Any) -> str:
    """Return the first module whose values for an example differ between a batch and the example alone, or "".

    Args:
        module: the model.
        x_N: five examples.
    """
    rows = BATCHES[1]
    together = _events(module, rows_of(x_N, rows))
    alone = [_events(module, rows_of(x_N, slice(n, n + 1))) for n in range(rows.start, rows.stop)]
    for number, event in enumerate(together):
        if any(len(events) <= number or events[number].name != event.name for events in alone):
            return event.name
        if not _is_joined(event.values, [events[number].values for events in alone]):
            return event.name
    return ""


def _events(module: nn.Module, x_B: Any) -> list[_Event]:
    """Return inputs and outputs of all modules, in the order of the computation."""
    events: list[_Event] = []
    parts = dict(module.named_modules())

    def before(parent: str, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        events.extend(_Event(parent, v.detach().clone()) for v in inputs if isinstance(v, torch.Tensor))

    def after(name: str, part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor):
            events.append(_Event(name, output.detach().clone()))

    hooks = []
    for name, part in parts.items():
        parent = name.rpartition(".")[0]
        hooks.append(part.register_forward_pre_hook(partial(before, describe_module(parent, parts[parent]))))
        hooks.append(part.register_forward_hook(partial(after, describe_module(name, part))))
    try:
        with torch.no_grad():
            module(x_B)
    finally:
        for hook in hooks:
            hook.remove()
    return events


def _is_joined(values: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Return whether a tensor of a batch has the values of its examples, along any axis, or does not depend on them."""
    if all(part.shape == values.shape for part in parts):
        return all(_is_close(values, part) for part in parts)
    for axis in range(values.ndim):
        others = [part for part in parts if part.ndim == values.ndim]
        sizes = [(*part.shape[:axis], *part.shape[axis + 1 :]) for part in others]
        fits = sizes and set(sizes) == {(*values.shape[:axis], *values.shape[axis + 1 :])}
        if len(others) == len(parts) and fits and _is_close(values, torch.cat(parts, axis)):
            return True
    return False


def _is_close(values: torch.Tensor, others: torch.Tensor) -> bool:
    if values.shape != others.shape:
        return False
    values, others = values.double().nan_to_num(), others.double().nan_to_num()
    scale = max(float(values.abs().max()), float(others.abs().max())) if values.numel() else 0.0
    return bool((values - others).abs().max() <= TOLERANCE * scale) if values.numel() else True
