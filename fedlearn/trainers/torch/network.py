"""Run any PyTorch module on one input or several inputs, and select its outputs.

Shapes: B batch, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fedlearn.core.inputs import call_with, map_inputs
from fedlearn.trainers.contract import choose_output, select_output

Forward = Callable[[nn.Module, Any], Any]  # (module, inputs) -> outputs
Trim = Callable[[Any], Any]  # inputs of a batch -> inputs without needless padding
INNER = "inner"  # name of the module of the user in a `Network`


class Network(nn.Module):
    """Give a module of the user one input and one output.

    Args:
        inner: module of the user. It does not change.
        run: runs the module, ``(module, inputs) -> outputs``. None calls it: a mapping of inputs gives its arguments by
            name, a tuple by position.
        output: key, position or attribute of the outputs. None selects ``logits``, if the module returns no tensor.
        trim: removes needless padding from a batch; None changes nothing.
    """

    def __init__(
        self,
        inner: nn.Module,
        run: Forward | None = None,
        output: str | int | None = None,
        trim: Trim | None = None,
    ) -> None:
        super().__init__()
        self.inner, self._run, self._output, self._trim = inner, run, output, trim

    @property
    def is_plain(self) -> bool:
        """True if the module of the user runs without other code."""
        return self._run is None and self._output is None and self._trim is None

    def trimmed(self, x_B: Any) -> Any:
        """Return a batch without needless padding."""
        return x_B if self._trim is None else self._trim(x_B)

    def lengths(self, x_B: Any) -> torch.Tensor | None:
        """Return the number of inputs of each example without padding, e.g. tokens; None without ``trim``."""
        if self._trim is None:
            return None
        rows = [rows_of(x_B, slice(i, i + 1)) for i in range(len(first_of(x_B)))]
        return torch.tensor([first_of(self._trim(row)).numel() for row in rows])

    def forward(self, x_B: Any) -> Any:
        """Return the outputs ``(B, C)`` for a tensor, or for a mapping or a tuple of tensors."""
        result = call_with(self.inner, x_B) if self._run is None else self._run(self.inner, x_B)
        if isinstance(result, torch.Tensor | torch.fx.Proxy):
            return result
        return choose_output(result) if self._output is None else select_output(result, self._output)


def take(x: Any, rows_B: torch.Tensor) -> Any:
    """Return rows of the inputs of a model."""
    return map_inputs(lambda part: part.index_select(0, rows_B), x)


def divide(x: Any, size: int, dim: int = 0) -> list[Any]:
    """Return the inputs of a model in parts of at most ``size`` examples, along an axis."""
    if isinstance(x, torch.Tensor):
        return list(x.split(size, dim=dim))
    count = first_of(x).shape[dim]
    return [map_inputs(partial(_narrow, dim, start, size), x) for start in range(0, count, size)]


def _narrow(dim: int, start: int, size: int, part: torch.Tensor) -> torch.Tensor:
    return part.narrow(dim, start, min(size, part.shape[dim] - start))


def first_of(x: Any) -> torch.Tensor:
    """Return the first tensor of the inputs of a model."""
    while not isinstance(x, torch.Tensor):
        x = next(iter(x.values() if isinstance(x, dict) else x))
    return x


def with_axis(x: Any) -> Any:
    """Return the inputs of one example as a batch of one."""
    return map_inputs(lambda part: part[None], x)


def rows_of(x: Any, rows: Any) -> Any:
    """Return a slice or selected rows of the inputs of a model."""
    return map_inputs(lambda part: part[rows], x)


def copy_of(x: Any) -> Any:
    """Return a copy of the inputs of a model."""
    return map_inputs(torch.clone, x)


def without_prefix(name: str) -> str:
    """Return the name of a part of a `Network` in the module of the user."""
    return name.removeprefix(INNER).removeprefix(".") if name == INNER or name.startswith(f"{INNER}.") else name
