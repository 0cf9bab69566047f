"""Losses of the tasks in PyTorch, one value per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F  # noqa: N812

from fedlearn.core.tasks import Task

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (outputs_BC, y_B) -> loss_B


def _logistic(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(outputs[:, 0], y.float(), reduction="none")


def _cox(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the negative log partial likelihood of each event; its risk sets are the batch. See `core.tasks.survival`.

    The memory grows with the square of the batch.
    """
    score, time, is_event = outputs[:, 0], y[:, 0], y[:, 1] > 0
    rows = torch.arange(len(score), device=score.device)
    is_real = (time > 0) | is_event  # a row of padding has time 0 and no event
    at_risk = ((time >= time[:, None]) & is_real) | (rows == rows[:, None])
    tied = (time == time[:, None]) & is_event
    log_risk = torch.logsumexp(torch.where(at_risk, score, float("-inf")), dim=1)
    tied_share = torch.where(tied, torch.exp(torch.where(tied, score - log_risk[:, None], 0.0)), 0.0).sum(dim=1)
    place = (tied & (rows < rows[:, None])).sum(dim=1) / tied.sum(dim=1).clamp(min=1)
    loss = log_risk + torch.log1p(-place * torch.where(is_event, tied_share, 0.0)) - score
    return torch.where(is_event, loss, 0.0)


def _position_loss(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over the positions of each example, for outputs ``(B, C, ...)``; -1 is padding."""
    losses = F.cross_entropy(outputs, y, ignore_index=-1, reduction="none").flatten(1)
    return losses.sum(dim=1) / (y >= 0).flatten(1).sum(dim=1).clamp(min=1)


LOSSES: Mapping[str, Loss] = {
    "binary": _logistic,
    "ranking": _logistic,
    "multiclass": lambda outputs, y: F.cross_entropy(outputs, y, reduction="none"),
    "regression": lambda outputs, y: (outputs[:, 0] - y) ** 2,
    "multilabel": lambda outputs, y: F.binary_cross_entropy_with_logits(outputs, y.float(), reduction="none").mean(1),
    "survival": _cox,
    "segmentation": _position_loss,
    "causal_lm": lambda outputs, y: outputs[:, 0] / outputs[:, 2].clamp(min=1),
    "token_classification": lambda outputs, y: _position_loss(outputs.movedim(-1, 1), y),
}


def loss_of(task: Task) -> Loss:
    """Return the loss of a task.

    Raises:
        SettingError: The task of the user has no loss for torch.
    """
    return LOSSES[task.name] if task.loss is None and task.name in LOSSES else task.loss_for("torch")
