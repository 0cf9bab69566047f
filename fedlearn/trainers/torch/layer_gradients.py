"""Per-example gradients of single layers, in implicit form.

An affine layer with input a and output gradient d on one example satisfies ``|d a^T|^2 = |d|^2 |a|^2``. Gram matrices
extend this to T positions. Opacus computes the per-example gradients of other layers.

Shapes: B batch, T positions (1, time steps, pixels), F inputs and O outputs of a layer.

Reference: Goodfellow, *Efficient Per-Example Gradient Computations*, 2015, arXiv:1510.01799; Bu, Wang, Zha, Karypis,
*Differentially Private Optimization on Large Model at Small Cost*, ICML 2023, arXiv:2210.00038.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

OPACUS_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.RMSNorm,
)


class Share(NamedTuple):
    """The per-example gradients of some parameters of a layer, in implicit form."""

    parameters: Sequence[torch.Tensor]
    squared_norm_B: torch.Tensor  # squared norm of the gradient of each example
    weighted_sum: Callable[[torch.Tensor], Sequence[torch.Tensor]]  # factor_B -> sum of factor_i gradient_i


def is_known(layer: nn.Module) -> bool:
    """Return whether `layer_shares` has a rule for the layer."""
    if type(layer) in (nn.Linear, nn.Embedding):
        return True
    from opacus.grad_sample import GradSampleModule  # imported here, because the import takes seconds

    return type(layer) in OPACUS_LAYERS and type(layer) in GradSampleModule.GRAD_SAMPLERS


def layer_shares(layer: nn.Module, inputs: torch.Tensor, gradient: torch.Tensor, *, from_vmap: bool) -> list[Share]:
    """Return the shares of the parameters of a layer.

    Args:
        layer: layer for which `is_known` is true.
        inputs: inputs, ``(B, ...)``.
        gradient: gradient of the losses with respect to the outputs, ``(B, ...)``.
        from_vmap: whether the model ran once per example inside ``vmap``. Then axis 1 is a batch of one example.
    """
    if isinstance(layer, nn.Linear):
        if inputs.ndim == 2:
            return [_affine(layer, inputs, gradient)]
        return [_affine_at_positions(layer, _positions(inputs), _positions(gradient))]
    if isinstance(layer, nn.Embedding):
        return [_embedding(layer, inputs, gradient)]
    if from_vmap:
        inputs, gradient = _without_unit_axis(layer, inputs), _without_unit_axis(layer, gradient)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        patches_BTF = _patches(layer, inputs)
        if patches_BTF is not None:
            return [_affine_at_positions(layer, patches_BTF, gradient.flatten(2).transpose(1, 2))]
    from opacus.grad_sample import GradSampleModule

    sampled = GradSampleModule.GRAD_SAMPLERS[type(layer)](layer, [inputs], gradient)
    if any(len(gradient_B) != len(inputs) for gradient_B in sampled.values()):
        raise ValueError("a layer has no gradient per example")
    return [share_of_gradients(parameter, gradient_B) for parameter, gradient_B in sampled.items()]


def _without_unit_axis(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Remove axis 1, which has the length 1, for layers that need channels at axis 1."""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return values
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and values.ndim == len(layer.kernel_size) + 2:
        return values  # the model calls the layer without a batch axis
    if values.shape[1] != 1:
        raise ValueError("a layer gets several inputs per example")
    return values.squeeze(1)


def _positions(values: torch.Tensor) -> torch.Tensor:
    """Return values ``(B, ..., F)`` as ``(B, T, F)``."""
    return values.reshape(len(values), -1, values.shape[-1])


def _patches(layer: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor | None:
    """Return the input patch of each output pixel of a convolution, ``(B, T, F)``; None for padding by name."""
    if isinstance(layer.padding, str):
        return None
    options: Any = {"padding": layer.padding, "stride": layer.stride, "dilation": layer.dilation}
    return F.unfold(inputs, layer.kernel_size, **options).transpose(1, 2)


def _affine(layer: nn.Linear, a_BF: torch.Tensor, d_BO: torch.Tensor) -> Share:
    """Return the share of an affine layer. Example i has the gradient ``d_i a_i^T`` (weight) and ``d_i`` (bias)."""
    weight, bias = _trained(layer)
    squared_a_B = a_BF.square().sum(1) if weight else torch.zeros_like(d_BO[:, 0])
    squared_norm_B = d_BO.square().sum(1) * (squared_a_B + len(bias))

    def weighted_sum(factor_B: torch.Tensor) -> list[torch.Tensor]:
        scaled_BO = d_BO * factor_B[:, None]
        return [scaled_BO.t() @ a_BF for _ in weight] + [scaled_BO.sum(0) for _ in bias]

    return Share([*weight, *bias], squared_norm_B, weighted_sum)


def _affine_at_positions(layer: nn.Linear | nn.Conv2d, a_BTF: torch.Tensor, d_BTO: torch.Tensor) -> Share:
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

    return Share([*weight, *bias], squared_norm_B, weighted_sum)


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


def _embedding(layer: nn.Embedding, index: torch.Tensor, gradient: torch.Tensor) -> Share:
    """Return the share of an embedding. The gradient of example i adds ``d_it`` to row ``index_it`` of the table."""
    index_BT, d_BTO = index.reshape(len(index), -1), _positions(gradient)
    if layer.padding_idx is not None:
        d_BTO = d_BTO * (index_BT != layer.padding_idx)[:, :, None]
    same_BTT = index_BT[:, :, None] == index_BT[:, None, :]
    squared_norm_B = ((d_BTO @ d_BTO.transpose(1, 2)) * same_BTT).sum((1, 2))

    def weighted_sum(factor_B: torch.Tensor) -> list[torch.Tensor]:
        scaled = (d_BTO * factor_B[:, None, None]).flatten(0, 1)
        return [torch.zeros_like(layer.weight).index_add_(0, index_BT.flatten(), scaled)]

    return Share([layer.weight], squared_norm_B, weighted_sum)


def share_of_gradients(parameter: torch.Tensor, gradient_B: torch.Tensor) -> Share:
    """Return the share of a parameter whose per-example gradients are in memory."""
    squared_norm_B = gradient_B.reshape(len(gradient_B), -1).square().sum(1)
    return Share([parameter], squared_norm_B, lambda factor_B: [torch.tensordot(factor_B, gradient_B, 1)])
