"""Losses of several copies of a model, and their gradients with respect to the outputs, with the bits of autograd.

Shapes: K copies, B batch, C outputs, N examples of all copies.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

from fedlearn.trainers.torch.losses import LOSSES, Loss

_aten = torch.ops.aten
_NO_REDUCTION, _NO_CLASS = 0, -100  # arguments of the functions of torch


def write_loss_gradients(
    loss: Loss, outputs: torch.Tensor, y_KB: torch.Tensor, delta: torch.Tensor, *, share: float
) -> torch.Tensor:
    """Write the gradients of a share of each loss, and return the losses, ``(K, B)``.

    Each copy has the bits of a call for this copy alone. A function for all copies either computes each row alone, or
    is elementwise on memory with a gap after each copy.

    Args:
        loss: ``(outputs_BC, y_B) -> loss_B``, a loss of `LOSSES`.
        outputs: outputs ``(K, B, C)``, in memory with gaps.
        y_KB: targets.
        delta: receives the gradients, ``(K, B, C)``.
        share: factor of the losses.
    """
    num_outputs, is_vector = outputs.shape[2], y_KB.ndim == 2
    if loss is LOSSES["multiclass"] and is_vector and not y_KB.is_floating_point():
        losses_N, gradient_NC = _cross_entropy(outputs.reshape(-1, num_outputs), y_KB.flatten(), share)
        delta.copy_(gradient_NC.view(delta.shape))
        return losses_N.view(y_KB.shape)
    if loss is LOSSES["binary"] and num_outputs == 1 and is_vector:
        logits_KB, y_KB = outputs[:, :, 0], y_KB.float()
        torch.mul(logits_KB.sigmoid() - y_KB, share, out=delta[:, :, 0])
        return F.binary_cross_entropy_with_logits(logits_KB, y_KB, reduction="none")
    if loss is LOSSES["regression"] and num_outputs == 1 and is_vector:  # elementwise: its outputs may be at axis 1
        return _by_autograd(loss, outputs.transpose(1, 2), y_KB, delta.transpose(1, 2), share)
    parts = zip(outputs, y_KB, delta, strict=True)
    return torch.stack([_by_autograd(loss, *part, share) for part in parts])


def _cross_entropy(outputs_NC: torch.Tensor, y_N: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses and their gradients, with the functions that autograd calls."""
    log_NC, arguments = torch.log_softmax(outputs_NC, 1), (y_N, None, _NO_REDUCTION, _NO_CLASS)
    losses_N, weight = _aten.nll_loss_forward(log_NC, *arguments)
    share_N = losses_N.new_full(losses_N.shape, share)
    gradient_NC = _aten.nll_loss_backward(share_N, log_NC, *arguments, weight)
    return losses_N, _aten._log_softmax_backward_data(gradient_NC, log_NC, 1, log_NC.dtype)


def _by_autograd(loss: Loss, outputs: torch.Tensor, y: torch.Tensor, delta: torch.Tensor, share: float) -> torch.Tensor:
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        losses = loss(leaf, y)
    (gradient,) = torch.autograd.grad(losses, leaf, losses.new_full(losses.shape, share))
    delta.copy_(gradient)
    return losses.detach()
