"""Run the frozen affine layers of a model with oneDNN instead of MKL.

MKL limits itself on processors of AMD. There, oneDNN multiplies matrices of float32 about twice as fast. Weights that
train keep the products of torch, so only models with a frozen base change.

Shapes: F inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fedlearn.trainers.torch.compat import fast_linear

CONV1D = "Conv1D"  # affine layer of GPT-2 in transformers, with a transposed weight


class FrozenLayers:
    """Hold the affine layers of a model whose parameters do not train.

    Args:
        module: the model.
        device: device of torch. Only a CPU has such a product.
    """

    def __init__(self, module: nn.Module, device: str) -> None:
        parts = module.modules() if device == "cpu" and fast_linear is not None else ()
        self._layers: list[Any] = [part for part in parts if _is_affine(part) and _is_frozen(part)]

    @contextmanager
    def using(self) -> Iterator[None]:
        """Use the products of oneDNN in this block of code."""
        with ExitStack() as stack:
            for layer in self._layers:
                if "forward" not in vars(layer):
                    layer.forward = partial(_forward, layer)
                    stack.callback(vars(layer).pop, "forward")
            yield


class _Product(torch.autograd.Function):
    """Multiply with a frozen weight. The backward pass computes the gradient of the inputs only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OF: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight_OF)
        assert fast_linear is not None
        return fast_linear(x, weight_OF, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight_OF,) = ctx.saved_tensors
        assert fast_linear is not None
        return fast_linear(gradients[0], weight_OF.t(), None), None, None


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the outputs of a layer. Low precision and other types keep the products of torch."""
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        outputs: torch.Tensor = type(layer).forward(layer, x)
        return outputs
    weight = layer.weight.detach()
    outputs = _Product.apply(x, weight.t() if type(layer).__name__ == CONV1D else weight, layer.bias)
    return outputs


def _is_affine(part: nn.Module) -> bool:
    return type(part) is nn.Linear or type(part).__name__ == CONV1D


def _is_frozen(part: nn.Module) -> bool:
    return all(p.dtype == torch.float32 and not p.requires_grad for p in part.parameters(recurse=False))
