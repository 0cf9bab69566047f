"""Sum clipped per-example gradients in PyTorch, in many layers without computing the gradients themselves.

Shapes: B batch, T positions (1, time steps, pixels), F inputs and O outputs of a layer, D parameters.
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
    """The per-example gradients of some parameters of a layer, in implicit form."""

    parameters: Sequence[torch.Tensor]
    squared_norm_B: torch.Tensor  # squared norm of the gradient of each example
    weighted_sum: Callable[[torch.Tensor], Sequence[torch.Tensor]]  # factor_B -> sum of factor_i gradient_i


class _Call(NamedTuple):
    """One call of a layer in the forward pass."""

    layer: nn.Module
    inputs: tuple[torch.Tensor, ...]
    versions: list[int]  # versions of the inputs at the time of the call
    output: GradientEdge


class ClippedGradient:
    """Compute ``(x_B, y_B) -> sum_i g_i min(1, C / |g_i|)``, where g_i is the gradient of the loss of example i.

    One backward pass gives the gradients of the outputs of all layers. With the inputs of the layers, they give the
    norm of each g_i, and then the sum as one matrix product per layer. An affine layer with input a and output
    gradient d on one example satisfies ``|d a^T|^2 = |d|^2 |a|^2``. Gram matrices extend this to T positions. Opacus
    computes the per-example gradients of other layers.

    Two kinds of models need torch.func, which computes the gradient of each example. One kind has parameters outside
    these layers. The other kind calls a layer twice.

    Args:
        module: the model. The outputs of one example must not depend on other examples.
        loss: ``(outputs_BC, y_B) -> loss_B``.
        leaves: the parameters, in the order of the result.
        clip: L2 bound C on the gradient of each example, > 0.

    *Guarantees*: one more or one fewer example changes the sum by at most C (up to rounding), for any example. An
    example whose gradient is not finite adds nothing.

    Reference: Goodfellow, *Efficient Per-Example Gradient Computations*, 2015, arXiv:1510.01799; Bu, Wang, Zha,
    Karypis, *Differentially Private Optimization on Large Model at Small Cost*, ICML 2023, arXiv:2210.00038.
    """

    def __init__(self, module: nn.Module, loss: Loss, leaves: Sequence[nn.Parameter], *, clip: float) -> None:
        self.module, self.loss, self.leaves, self.clip = module, loss, list(leaves), clip
        owners = [part for part in module.modules() if any(p.requires_grad for p in part.parameters(recurse=False))]
        owned = [p for part in owners for p in part.parameters(recurse=False) if p.requires_grad]
        self._layerwise = all(_is_known(part) for part in owners) and len(owned) == len(self.leaves)
        self._num_layers = len(owners)
        self._calls: list[_Call] | None = None  # calls in the current forward pass, or None
        if self._layerwise:
            for part in owners:
                part.register_forward_hook(self._record)

    @torch.no_grad()
    def __call__(
        self, x_B: torch.Tensor, y_B: torch.Tensor, *, scale: float = 1.0
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return ``scale`` times the sum for each parameter, and the losses of the examples that it includes."""
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
        """Return the shares of all layers from one backward pass, and the losses."""
        calls: list[_Call] = []
        self._calls = calls
        try:
            with torch.enable_grad():
                loss_B = self.loss(self.module(x_B), y_B)
        finally:
            self._calls = None
        if not (len(calls) == self._num_layers == len({c.layer for c in calls}) and all(map(_is_intact, calls))):
            self._layerwise = False  # also for all later batches
            return self._by_example(x_B, y_B)
        gradients = torch.autograd.grad(loss_B, [call.output for call in calls], torch.ones_like(loss_B))
        shares = [_shares(c.layer, c.inputs[0], gradient) for c, gradient in zip(calls, gradients, strict=True)]
        return [share for layer_shares in shares for share in layer_shares], loss_B.detach()

    def _record(self, layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if self._calls is not None:  # a gradient edge, because the next layer may change the output in place
            call = _Call(layer, inputs, [v._version for v in inputs], get_gradient_edge(output))
            self._calls.append(call)

    def _by_example(self, x_B: torch.Tensor, y_B: torch.Tensor) -> tuple[list[_Share], torch.Tensor]:
        """Return the shares of all parameters from the gradient of each example, and the losses."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        leaves = {names[id(leaf)]: leaf.detach() for leaf in self.leaves}

        def loss_of(leaves: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            outputs = torch.func.functional_call(self.module, leaves, (x[None],))
            return self.loss(outputs, y[None])[0]

        per_example = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0), randomness="different")
        gradients, loss_B = per_example(leaves, x_B, y_B)
        return [_share_of_gradients(leaf, gradients[names[id(leaf)]]) for leaf in self.leaves], loss_B


def _is_intact(call: _Call) -> bool:
    """Return whether the layer got one tensor, and no later operation changed this tensor in place."""
    return len(call.inputs) == 1 and call.inputs[0]._version == call.versions[0]


def _is_known(layer: nn.Module) -> bool:
    """Return whether this module or Opacus has per-example gradients for the layer."""
    if type(layer) in (nn.Linear, nn.Embedding):
        return True
    from opacus.grad_sample import GradSampleModule  # imported here, because the import takes seconds

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
    return [_share_of_gradients(parameter, gradient_B) for parameter, gradient_B in sampled.items()]


def _positions(values: torch.Tensor) -> torch.Tensor:
    """Return values ``(B, ..., F)`` as ``(B, T, F)``."""
    return values.reshape(len(values), -1, values.shape[-1])


def _patches(layer: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor | None:
    """Return the input patch of each output pixel of a convolution, ``(B, T, F)``; None for padding by name."""
    if isinstance(layer.padding, str):
        return None
    options: Any = {"padding": layer.padding, "stride": layer.stride, "dilation": layer.dilation}
    return F.unfold(inputs, layer.kernel_size, **options).transpose(1, 2)


def _affine(layer: nn.Linear, a_BF: torch.Tensor, d_BO: torch.Tensor) -> _Share:
    """Return the share of an affine layer. Example i has the gradient ``d_i a_i^T`` (weight) and ``d_i`` (bias)."""
    weight, bias = _trained(layer)
    squared_a_B = a_BF.square().sum(1) if weight else torch.zeros_like(d_BO[:, 0])
    squared_norm_B = d_BO.square().sum(1) * (squared_a_B + len(bias))

    def weighted_sum(factor_B: torch.Tensor) -> list[torch.Tensor]:
        scaled_BO = d_BO * factor_B[:, None]
        return [scaled_BO.t() @ a_BF for _ in weight] + [scaled_BO.sum(0) for _ in bias]

    return _Share([*weight, *bias], squared_norm_B, weighted_sum)


def _affine_at_positions(layer: nn.Linear | nn.Conv2d, a_BTF: torch.Tensor, d_BTO: torch.Tensor) -> _Share:
    """Return the share of an affine layer that acts at T positions.

    Example i has the gradient ``sum_t d_it a_it^T`` (weight) and ``sum_t d_it`` (bias).
    """
    weight, bias = _trained(layer)
    squared_norm_B = d_BTO.sum(1).square().sum(1) * len(bias)
    if weight:
        squared_norm_B = squared_norm_B + _squared_norm_of_products(a_BTF, d_BTO)

    def weighted_sum(factor_B: torch.Tensor) -> list[torch.Tensor]:
        scaled = (d_BTO * factor_B[:, None, None]).flatten(0, 1)
        return [(scaled.t() @ a_BTF.flatten(0, 1)).view_as(w) for w in weight] + [scaled.sum(0) for _ in bias]

    return _Share([*weight, *bias], squared_norm_B, weighted_sum)


def _trained(layer: nn.Linear | nn.Conv2d) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the trainable weight and the trainable bias, each as a list of at most one tensor."""
    weight, bias = layer.weight, layer.bias  # read once, because attributes of a module are slow
    weights: list[torch.Tensor] = [weight] if weight.requires_grad else []
    biases: list[torch.Tensor] = [bias] if bias is not None and bias.requires_grad else []
    return weights, biases


def _squared_norm_of_products(a_BTF: torch.Tensor, d_BTO: torch.Tensor) -> torch.Tensor:
    """Return ``|sum_t d_t a_t^T|^2`` of each example, from Gram matrices or from the product if it is smaller."""
    _, positions, features = a_BTF.shape
    if 2 * positions**2 <= features * d_BTO.shape[2]:
        return ((a_BTF @ a_BTF.transpose(1, 2)) * (d_BTO @ d_BTO.transpose(1, 2))).sum((1, 2))
    return (d_BTO.transpose(1, 2) @ a_BTF).square().sum((1, 2))


def _embedding(layer: nn.Embedding, index: torch.Tensor, gradient: torch.Tensor) -> _Share:
    """Return the share of an embedding. The gradient of example i adds ``d_it`` to row ``index_it`` of the table."""
    index_BT, d_BTO = index.reshape(len(index), -1), _positions(gradient)
    if layer.padding_idx is not None:
        d_BTO = d_BTO * (index_BT != layer.padding_idx)[:, :, None]
    same_BTT = index_BT[:, :, None] == index_BT[:, None, :]
    squared_norm_B = ((d_BTO @ d_BTO.transpose(1, 2)) * same_BTT).sum((1, 2))

    def weighted_sum(factor_B: torch.Tensor) -> list[torch.Tensor]:
        scaled = (d_BTO * factor_B[:, None, None]).flatten(0, 1)
        return [torch.zeros_like(layer.weight).index_add_(0, index_BT.flatten(), scaled)]

    return _Share([layer.weight], squared_norm_B, weighted_sum)


def _share_of_gradients(parameter: torch.Tensor, gradient_B: torch.Tensor) -> _Share:
    """Return the share of a parameter whose per-example gradients are in memory."""
    squared_norm_B = gradient_B.flatten(1).square().sum(1)
    return _Share([parameter], squared_norm_B, lambda factor_B: [torch.tensordot(factor_B, gradient_B, 1)])
