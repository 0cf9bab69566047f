"""Run forward and backward passes of several copies of a chain of linear layers, without autograd.

The passes give the bits that autograd gives for each copy alone. The memory of a result has a gap after each copy. So
torch multiplies the matrices of each copy with the function that it uses for a single matrix. Elementwise functions
treat each copy like a single tensor.

Shapes: K copies, B batch, F features, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch

from fedlearn.trainers.torch.chain import Chain

LINE = 16  # numbers of float32 in a cache line; the bits of a product can depend on the alignment of its memory
MIN_PRODUCT = 1024  # multiplications; below 400, torch multiplies several matrices with other code than a single matrix


class LayerParameters(NamedTuple):
    """Weights ``(K, O, F)`` and biases ``(K, O)`` of the copies of a layer, or their gradients."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class RowMemory:
    """Memory for tensors of which only the last ones of each name are in use."""

    def __init__(self) -> None:
        self._flat: dict[Hashable, torch.Tensor] = {}

    def rows(self, name: Hashable, count: int, *shape: int, gap: bool = True) -> torch.Tensor:
        """Return an uninitialized tensor ``(count, *shape)`` with a gap after each row. Rows start at a cache line.

        Args:
            name: name of the memory.
            count: number of rows.
            shape: shape of a row.
            gap: False leaves no gap if the rows then start at a cache line.
        """
        size = prod(shape)
        stride = size if not gap and size % LINE == 0 else (size // LINE + 2) * LINE
        if name not in self._flat or len(self._flat[name]) < count * stride:
            self._flat[name] = torch.empty(count * stride, dtype=torch.float32)
        return self._flat[name][: count * stride].view(count, stride)[:, :size].unflatten(1, shape)


class ChainPasses:
    """The passes of K copies of a chain with batches of B examples.

    Args:
        chain: the chain.
        parameters: parameters of the copies of each layer.
        gradients: receives the gradients of the parameters; None for no gradients.
        size: batch size B, >= 1.
        memory: memory for all other results.

    Attributes:
        x: inputs of the model, ``(K, B, F)``, which the caller writes.
        inputs: inputs of each layer.
        outputs: outputs of the model.
        deltas: gradients of the losses with respect to the results of the layers, ``(K, B, O)``.
        delta: gradients with respect to the outputs, which the caller writes.
    """

    def __init__(
        self,
        chain: Chain,
        parameters: Sequence[LayerParameters],
        gradients: Sequence[LayerParameters] | None,
        *,
        size: int,
        memory: RowMemory,
    ) -> None:
        count, self.size = len(parameters[0].weight), size
        self.x = memory.rows("x", count, size, chain.links[0].layer.in_features, gap=False)
        values, self.inputs, self.deltas = self.x, [self.x], list[torch.Tensor]()
        self._forward: list[Callable[[], Any]] = []
        self._backward: list[Callable[[], Any]] = []  # in the order of the layers
        for i, (link, (weight, bias)) in enumerate(zip(chain.links, parameters, strict=True)):
            delta = memory.rows(("delta", i), count, size, link.layer.out_features)
            backward = list[Callable[[], Any]]()
            if i > 0:
                backward.append(_product(delta, weight, self.deltas[-1]))
            if gradients is not None:
                backward.append(_product(delta.transpose(1, 2), values, gradients[i].weight))
                if bias is not None:
                    backward.append(partial(torch.sum, delta, 1, out=gradients[i].bias))
            layer_inputs, values = values, memory.rows(("values", i, 0), *delta.shape)
            self._forward.append(_product(layer_inputs, weight.transpose(1, 2), values, bias))
            for j, activation in enumerate(link.activations):
                is_in_place = j == 0 and not activation.needs_inputs
                results = values if is_in_place else memory.rows(("values", i, j + 1), *delta.shape)
                self._forward.append(partial(activation.run, values, out=results))
                known = values if activation.needs_inputs else results
                backward.append(partial(activation.differentiate, delta, known, grad_input=delta))
                values = results
            self._backward += backward
            self.inputs.append(values)
            self.deltas.append(delta)
        self.outputs, self.delta = self.inputs.pop(), self.deltas[-1]
        self._backward.reverse()

    def forward(self) -> torch.Tensor:
        """Compute the outputs of all copies."""
        for run in self._forward:
            run()
        return self.outputs

    def backward(self) -> None:
        """Compute all gradients from the gradients with respect to the outputs."""
        for run in self._backward:
            run()


def _product(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
) -> Callable[[], Any]:
    """Return a function that writes the matrix product of each copy, plus a bias for each column."""
    count, num_multiplications = len(left), prod(left.shape[1:]) * right.shape[2]
    if count > 1 and num_multiplications >= MIN_PRODUCT:
        if bias is None:
            return partial(torch.bmm, left, right, out=out)
        return partial(torch.baddbmm, bias.unsqueeze(1), left, right, out=out)
    parts = list(zip(left, right, out, left if bias is None else bias, strict=True))

    def run() -> None:
        for left_k, right_k, out_k, bias_k in parts:
            if bias is None:
                torch.mm(left_k, right_k, out=out_k)
            else:
                torch.addmm(bias_k, left_k, right_k, out=out_k)

    return run
