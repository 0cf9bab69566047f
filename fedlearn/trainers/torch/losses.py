"""Losses of the tasks in PyTorch, one value per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F  # noqa: N812

from fedlearn.core.tasks import Task

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (outputs_BC, y_B) -> loss_B


def _logistic(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(outputs[:, 0], y.float(), reduction="none")


LOSSES: Mapping[str, Loss] = {
    "binary": _logistic,
    "ranking": _logistic,
    "multiclass": lambda outputs, y: F.cross_entropy(outputs, y, reduction="none"),
    "regression": lambda outputs, y: (outputs[:, 0] - y) ** 2,
}


def loss_of(task: Task) -> Loss:
    """Return the loss of a task.

    Raises:
        SettingError: The task of the user has no loss for torch.
    """
    return LOSSES[task.name] if task.loss is None and task.name in LOSSES else task.loss_for("torch")
