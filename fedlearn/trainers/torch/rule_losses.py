"""Compute the training loss of each example in PyTorch, with the changes of a local rule and of the settings.

Shapes: K clients in a block, D parameters, B batch, F features, C outputs or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fedlearn.algorithm.batch import Batch, ModelOutputs
from fedlearn.trainers.torch.features import record_features
from fedlearn.trainers.torch.flat_model import FlatModel
from fedlearn.trainers.torch.job import Job
from fedlearn.trainers.torch.loss_changes import training_loss
from fedlearn.trainers.torch.losses import Loss

Forward = Callable[[Any], torch.Tensor]  # a model: x_B -> outputs_BC
# (model, x_B, y_B, real_B) -> loss_B
Losses = Callable[[Forward, Any, torch.Tensor, torch.Tensor], torch.Tensor]
RuleInputs = Mapping[str, torch.Tensor]  # values of one client for a rule that changes the loss
STATE = "state/"  # prefix of client states in `RuleInputs`


class TrainingLosses:
    """Compute the losses of examples in training.

    Args:
        model: the model.
        loss: ``(outputs_BC, y_B) -> loss_B``.
        task: name of the task.
    """

    def __init__(self, model: FlatModel, loss: Loss, task: str) -> None:
        self.model, self.loss, self.task = model, loss, task

    def plain(self, run: Forward, x_B: Any, y_B: torch.Tensor, real_B: torch.Tensor) -> torch.Tensor:
        """Return the loss of each example, without changes by a rule."""
        return self.loss(_as_float32(run(x_B)), y_B)

    def mixed(self, job: Job, losses: Losses) -> Losses:
        """Return the losses with forward passes in the precision of the settings. The loss itself is in float32."""
        if job.local.precision == "float32":
            return losses

        def in_low_precision(run: Forward, x_B: Any, y_B: torch.Tensor, real_B: torch.Tensor) -> torch.Tensor:
            return losses(partial(self._run_mixed, run), x_B, y_B, real_B)

        return in_low_precision

    def _run_mixed(self, run: Forward, x_B: Any) -> torch.Tensor:
        device = torch.device(self.model.device).type
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            return run(x_B)

    def inputs_of(self, job: Job, k: int) -> RuleInputs:
        """Return the values of one client for a rule that changes the loss: class counts and client state."""
        vectors_KC = {"counts": job.counts_KC, "weights": job.weights_KC}
        inputs = {name: rows_KC[k] for name, rows_KC in vectors_KC.items() if rows_KC is not None}
        if job.rule.penalty is not None:
            inputs |= {f"{STATE}{name}": v_D for name, v_D in job.penalty_state(job.work[k]).items()}
        return inputs

    def changed(
        self,
        job: Job,
        inputs: RuleInputs,
        run: Forward,
        x_B: Any,
        y_B: torch.Tensor,
        real_B: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss of each example, with the changes of the local rule and of the settings."""
        rule = job.rule
        if rule.penalty is None:
            outputs_BC, penalty_B = _as_float32(run(x_B)), 0
        else:
            raw_BC, features = record_features(self.model.module, partial(run, x_B))
            outputs_BC = _as_float32(raw_BC)
            fixed = partial(self._run_fixed, x_B)
            batch = Batch(
                outputs=outputs_BC, read_features=lambda: _as_float32(features()), targets=y_B, mask=real_B, run=fixed
            )
            state = {name.removeprefix(STATE): v_D for name, v_D in inputs.items() if name.startswith(STATE)}
            penalty_B = rule.penalty(batch, job.global_D, **state, **job.broadcast)
        logits_BC = rule.adjust_logits(outputs_BC, inputs["counts"]) if rule.adjust_logits else outputs_BC
        loss = training_loss(self.loss, self.task, job.local, inputs.get("weights"))
        return loss(logits_BC, y_B) + penalty_B

    def _run_fixed(self, x_B: Any, params_D: torch.Tensor) -> ModelOutputs:
        """Return the outputs of a model that is not trained, in evaluation mode and without gradients."""
        self.model.module.eval()
        with torch.no_grad():
            run = partial(self.model.apply, params_D, x_B)
            outputs_BC, features = record_features(self.model.module, run)
        self.model.module.train()
        return ModelOutputs(outputs=outputs_BC, read_features=features)


def _as_float32(values: torch.Tensor) -> torch.Tensor:
    """Return outputs or features of a forward pass in low precision as float32, and others unchanged."""
    return values.float() if values.dtype == torch.bfloat16 else values
