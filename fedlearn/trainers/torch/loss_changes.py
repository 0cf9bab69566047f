"""Change the loss of a task in PyTorch: class weights and label smoothing."""

from __future__ import annotations

import torch

from fedlearn.core.records import LocalSettings
from fedlearn.trainers.torch.losses import Loss


def training_loss(loss: Loss, task: str, local: LocalSettings, weights_C: torch.Tensor | None) -> Loss:
    """Return the loss of each example with label smoothing and class weights.

    Args:
        loss: loss of the task.
        task: name of the task.
        local: settings of local training.
        weights_C: factor of each class; None for no factors.
    """
    share = local.label_smoothing

    def changed(outputs_BC: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        if not share:
            loss_B = loss(outputs_BC, y_B)
        elif task == "multiclass":
            uniform_B = outputs_BC.logsumexp(dim=1) - outputs_BC.mean(dim=1)
            loss_B = (1 - share) * loss(outputs_BC, y_B) + share * uniform_B
        else:
            loss_B = loss(outputs_BC, y_B * (1 - share) + share / 2)
        return loss_B if weights_C is None else loss_B * weights_C[y_B.long()]

    return changed
