"""Sums of clipped per-example gradients in PyTorch, without the gradients where their norms can be had more cheaply.

Shapes: B batch, T positions (1, time steps, pixels), F inputs and O outputs of a layer, D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F  # noqa: N812

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (outputs_BC, y_B) -> loss_B


class _Share(NamedTuple):
    """What one layer adds to the gradient of some of its parameters."""

    parameters: Sequence[torch.Tensor]
    squared_norm_B: torch.Tensor  # of each example's gradient
    weighted_sum: Callable[[torch.Tensor], Sequence[torch.Tensor]]  # factor_B -> sum of factor_i gradient_i


class _Call(NamedTuple):
    """One use of a layer."""

    layer: nn.Module
    inputs: tuple[torch.Tensor, ...]
    versions: list[int]  # of the inputs, at that time
    output: GradientEdge


class ClippedGradient:
    """``(x_B, y_B) -> sum_i g_i min(1, C / |g_i|)``, where g_i is the gradient of example i's loss.

    One backward pass to the outputs of the layers gives, with their inputs, the norm of every g_i and then the sum as
    one matrix product for each layer. An affine layer with input a and output gradient d on one example has
    ``|d a^T|^2 = |d|^2 |a|^2``; over T positions the same holds with Gram matrices. Other layers are asked for their
    per-example gradients (Opacus). A model with parameters outside such layers, or that uses a layer twice, is
    differentiated example by example (torch.func).

    Args:
        module: the model; outputs of one example must not depend on others.
        loss: of each example.
        leaves: the parameters, in the order of the result.
        clip: C > 0.

    *Guarantees*: one example more or less moves the sum by at most C (up to rounding), whatever it holds; one whose
    gradient is not finite adds nothing.

    Reference: Goodfellow, *Efficient Per-Example Gradient Computations*, 2015, arXiv:1510.01799; Bu, Wang, Zha,
    Karypis, *Differentially Private Optimization on Large Model at Small Cost*, ICML 2023, arXiv:2210.00038.
    """

    def __init__(self, module: nn.Module, loss: Loss, leaves: Sequence[nn.Parameter], *, clip: float) -> None:
        self.module, self.loss, self.leaves, self.clip = module, loss, list(leaves), clip
        owners = [part for part in module.modules() if any(p.requires_grad for p in part.parameters(recurse=False))]
        owned = [p for part in owners for p in part.parameters(recurse=False) if p.requires_grad]
        self._layerwise = all(_is_known(part) for part in owners) and len(owned) == len(self.leaves)
        self._num_layers = len(owners)
        self._calls: list[_Call] | None = None  # those of the forward pass that is under way
        if self._layerwise:
            for part in owners:
                part.register_forward_hook(self._record)

    @torch.no_grad()
    def __call__(
        self, x_B: torch.Tensor, y_B: torch.Tensor, *, scale: float = 1.0
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """``scale`` times the sum for each parameter, and the losses of the examples in it."""
        if not len(y_B):
            return [torch.zeros_like(leaf) for leaf in self.leaves], y_B.new_zeros(0, dtype=torch.float32)
        shares, loss_B = self._by_layer(x_B, y_B) if self._layerwise else self._by_example(x_B, y_B)
        norm_B = torch.stack([share.squared_norm_B for share in shares]).sum(0).clamp_(min=0).sqrt_()
        if not isfinite(float(norm_B.sum())):
            finite_B = torch.isfinite(norm_B)
            if not finite_B.all():
                return self(x_B[finite_B], y_B[finite_B], scale=scale)
        factor_B = (scale * self.clip) / norm_B.clamp_(min=self.clip)
        sums: dict[torch.Tensor, torch.Tensor] = {}
        for share in shares:
            sums |= zip(share.parameters, share.weighted_sum(factor_B), strict=True)
        return [sums[leaf] for leaf in self.leaves], loss_B

    def _by_layer(self, x_B: torch.Tensor, y_B: torch.Tensor) -> tuple[list[_Share], torch.Tensor]:
        calls: list[_Call] = []
        self._calls = calls
        try:
            with torch.enable_grad():
                loss_B = self.loss(self.module(x_B), y_B)
        finally:
            self._calls = None
        if not (len(calls) == self._num_layers == len({c.layer for c in calls}) and all(map(_is_intact, calls))):
            self._layerwise = False  # from now on
            return self._by_example(x_B, y_B)
        gradients = torch.autograd.grad(loss_B, [call.output for call in calls], torch.ones_like(loss_B))
        shares = [_shares(c.layer, c.inputs[0], gradient) for c, gradient in zip(calls, gradients, strict=True)]
        return [share for some in shares for share in some], loss_B.detach()

    def _record(self, layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if self._calls is not None:  # an edge, since the next layer may change the output in place
            call = _Call(layer, inputs, [v._version for v in inputs], get_gradient_edge(output))
            self._calls.append(call)

    def _by_example(self, x_B: torch.Tensor, y_B: torch.Tensor) -> tuple[list[_Share], torch.Tensor]:
        names = {id(p): name for name, p in self.module.named_parameters()}
        leaves = {names[id(leaf)]: leaf.detach() for leaf in self.leaves}

        def loss_of(leaves: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            outputs = torch.func.functional_call(self.module, leaves, (x[None],))
            return self.loss(outputs, y[None])[0]

        of_each = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0), randomness="different")
        gradients, loss_B = of_each(leaves, x_B, y_B)
        return [_instantiated(leaf, gradients[names[id(leaf)]]) for leaf in self.leaves], loss_B


def _is_intact(call: _Call) -> bool:
    """Whether a layer was called with one tensor, and that tensor was not changed in place afterwards."""
    return len(call.inputs) == 1 and call.inputs[0]._version == call.versions[0]


def _is_known(layer: nn.Module) -> bool:
    if type(layer) in (nn.Linear, nn.Embedding):
        return True
    from opacus.grad_sample import GradSampleModule  # not before it is needed: its import takes seconds

    return type(layer) in GradSampleModule.GRAD_SAMPLERS


def _shares(layer: nn.Module, inputs: torch.Tensor, gradient: torch.Tensor) -> list[_Share]:
    if isinstance(layer, nn.Linear):
        if inputs.ndim == 2:
            return [_affine(layer, inputs, gradient)]
        return [_affine_at_positions(layer, _positions(inputs), _positions(gradient))]
    if isinstance(layer, nn.Embedding):
        return [_embedding(layer, inputs, gradient)]
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        patches_BTF = _patches(layer, inputs)
        if patches_BTF is not None:
            return [_affine_at_positions(layer, patches_BTF, gradient.flatten(2).transpose(1, 2))]
    from opacus.grad_sample import GradSampleModule

    sampled = GradSampleModule.GRAD_SAMPLERS[type(layer)](layer, [inputs], gradient)
    return [_instantiated(parameter, gradient_B) for parameter, gradient_B in sampled.items()]


def _positions(values: torch.Tensor) -> torch.Tensor:
    """``(B, ..., F)`` as ``(B, T, F)``."""
    return values.reshape(len(values), -1, values.shape[-1])


def _patches(layer: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor | None:
    """What each output pixel of a convolution sees, ``(B, T, F)``."""
    if isinstance(layer.padding, str):
        return None
    how: Any = {"padding": layer.padding, "stride": layer.stride, "dilation": layer.dilation}
    return F.unfold(inputs, layer.kernel_size, **how).transpose(1, 2)


def _affine(layer: nn.Linear, a_BF: torch.Tensor, d_BO: torch.Tensor) -> _Share:
    """A weight of which example i's gradient is ``d_i a_i^T``, and a bias of which it is ``d_i``."""
    weight, bias = _trained(layer)
    squared_a_B = a_BF.square().sum(1) if weight else torch.zeros_like(d_BO[:, 0])
    squared_norm_B = d_BO.square().sum(1) * (squared_a_B + len(bias))

    def weighted_sum(factor_B: torch.Tensor) -> list[torch.Tensor]:
        scaled_BO = d_BO * factor_B[:, None]
        return [scaled_BO.t() @ a_BF for _ in weight] + [scaled_BO.sum(0) for _ in bias]

    return _Share([*weight, *bias], squared_norm_B, weighted_sum)


def _affine_at_positions(layer: nn.Linear | nn.Conv2d, a_BTF: torch.Tensor, d_BTO: torch.Tensor) -> _Share:
    """A weight of which example i's gradient is ``sum_t d_it a_it^T``, and a bias of which it is ``sum_t d_it``."""
    weight, bias = _trained(layer)
    squared_norm_B = d_BTO.sum(1).square().sum(1) * len(bias)
    if weight:
        squared_norm_B = squared_norm_B + _squared_norm_of_products(a_BTF, d_BTO)

    def weighted_sum(factor_B: torch.Tensor) -> list[torch.Tensor]:
        scaled = (d_BTO * factor_B[:, None, None]).flatten(0, 1)
        return [(scaled.t() @ a_BTF.flatten(0, 1)).view_as(w) for w in weight] + [scaled.sum(0) for _ in bias]

    return _Share([*weight, *bias], squared_norm_B, weighted_sum)


def _trained(layer: nn.Linear | nn.Conv2d) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weight and the bias, or nothing where there is none to train."""
    weight, bias = layer.weight, layer.bias  # looked up once: a module searches for them
    weights: list[torch.Tensor] = [weight] if weight.requires_grad else []
    biases: list[torch.Tensor] = [bias] if bias is not None and bias.requires_grad else []
    return weights, biases


def _squared_norm_of_products(a_BTF: torch.Tensor, d_BTO: torch.Tensor) -> torch.Tensor:
    """``|sum_t d_t a_t^T|^2`` of each example, by Gram matrices or by the product itself, whichever is smaller."""
    _, positions, features = a_BTF.shape
    if 2 * positions**2 <= features * d_BTO.shape[2]:
        return ((a_BTF @ a_BTF.transpose(1, 2)) * (d_BTO @ d_BTO.transpose(1, 2))).sum((1, 2))
    return (d_BTO.transpose(1, 2) @ a_BTF).square().sum((1, 2))


def _embedding(layer: nn.Embedding, index: torch.Tensor, gradient: torch.Tensor) -> _Share:
    """A table of which example i's gradient adds ``d_it`` to row ``index_it``."""
    index_BT, d_BTO = index.reshape(len(index), -1), _positions(gradient)
    if layer.padding_idx is not None:
        d_BTO = d_BTO * (index_BT != layer.padding_idx)[:, :, None]
    same_BTT = index_BT[:, :, None] == index_BT[:, None, :]
    squared_norm_B = ((d_BTO @ d_BTO.transpose(1, 2)) * same_BTT).sum((1, 2))

    def weighted_sum(factor_B: torch.Tensor) -> list[torch.Tensor]:
        scaled = (d_BTO * factor_B[:, None, None]).flatten(0, 1)
        return [torch.zeros_like(layer.weight).index_add_(0, index_BT.flatten(), scaled)]

    return _Share([layer.weight], squared_norm_B, weighted_sum)


def _instantiated(parameter: torch.Tensor, gradient_B: torch.Tensor) -> _Share:
    squared_norm_B = gradient_B.flatten(1).square().sum(1)
    return _Share([parameter], squared_norm_B, lambda factor_B: [torch.tensordot(factor_B, gradient_B, 1)])
