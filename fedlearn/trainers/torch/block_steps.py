"""Take the local steps of clients in PyTorch, for a group of clients at once.

Shapes: K clients in a block, D parameters, S local steps, B batch, M micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlearn.core.inputs import map_inputs
from fedlearn.core.records import ClientWork
from fedlearn.trainers.batching import shared_base_array
from fedlearn.trainers.torch.flat_model import FlatModel
from fedlearn.trainers.torch.job import Job
from fedlearn.trainers.torch.network import divide, with_axis
from fedlearn.trainers.torch.noise import GridNoise
from fedlearn.trainers.torch.optimizers import clip_rows, optimizer_step
from fedlearn.trainers.torch.rule_losses import Losses, RuleInputs, TrainingLosses

# (params_D, inputs, vectors, x_B, y_B, real_B) -> gradient_D, total loss
BlockGradient = Callable[..., tuple[torch.Tensor, torch.Tensor]]
MAX_PER_EXAMPLE_GRADIENT_BYTES = 2**28  # maximum size of the per-example gradients in memory
VMAP_GROUP_SIZE = 256  # number of clients that step together on a CPU


class BlockSteps:
    """Train a block of clients together: one batch of models takes each step.

    Args:
        model: the model.
        losses: losses of examples in training.
    """

    def __init__(self, model: FlatModel, losses: TrainingLosses) -> None:
        self.model, self.losses = model, losses
        self._resident: tuple[np.ndarray, Any] | None = None

    def fit(self, job: Job) -> tuple[torch.Tensor, np.ndarray]:
        """Train all clients together, in groups that fit the processor cache.

        A client with fewer steps than the others does not change after its last step.
        """
        size = VMAP_GROUP_SIZE if self.model.device == "cpu" else len(job.work)
        if job.request.local.example_dp:  # a step of DP-SGD holds the gradients of all its examples in memory
            bytes_per_client = 4 * job.plan_KSB.shape[2] * self.model.layout.num_parameters
            size = min(size, max(1, MAX_PER_EXAMPLE_GRADIENT_BYTES // bytes_per_client))
        groups = [slice(start, start + size) for start in range(0, len(job.work), size)]
        parts = [self._fit_group(job, group) for group in groups]
        return torch.cat([delta for delta, _ in parts]), np.concatenate([losses for _, losses in parts])

    def _fit_group(self, job: Job, group: slice) -> tuple[torch.Tensor, np.ndarray]:
        """Train a group of clients together. Return the updates and the total losses."""
        work, batch_of = job.work[group], self._batches(job, group)
        frozen = torch.from_numpy(self.model.layout.positions(job.rule.frozen_parameters)).to(self.model.device)
        order_K = np.argsort(job.steps_K[group], kind="stable")  # a slice of it are the clients that have finished
        steps_K, finished_K = job.steps_K[group][order_K], torch.from_numpy(order_K).to(self.model.device)
        client_states = {
            name: torch.stack([self.model.to_device(client_work.client_state[name]) for client_work in work])
            for name in job.rule.client_state
        }
        start_KD = job.global_D.expand(len(work), -1)
        if any(client_work.start_D is not None for client_work in work):
            start_KD = torch.stack([job.start(client_work) for client_work in work])
        flat = nn.Parameter(start_KD.clone())
        step, total_K = optimizer_step([flat], job.local), torch.zeros(len(work), device=self.model.device)
        gradients, rates = self._block_gradients(job, group), job.block_rates(group)
        for s in range(int(steps_K[-1])):
            gradient_KD, sum_K = gradients(flat.detach(), *batch_of(s))
            gradient_KD.index_fill_(1, frozen, 0)
            if job.local.max_grad_norm is not None:
                gradient_KD = clip_rows(job.local.max_grad_norm, gradient_KD)
            gradient_KD = job.rule.correct(gradient_KD, flat.detach(), job.global_D, **client_states, **job.broadcast)
            done_K = finished_K[: np.searchsorted(steps_K, s, side="right")]
            before_KD = flat.detach().index_select(0, done_K)
            step((gradient_KD,), rates[s])
            flat.data.index_copy_(0, done_K, before_KD)
            flat.data.index_copy_(1, frozen, start_KD.index_select(1, frozen))  # weight decay needs no gradient
            total_K += sum_K
        return flat.detach() - start_KD, total_K.double().cpu().numpy()

    def _batches(self, job: Job, group: slice) -> Callable[[int], tuple[Any, torch.Tensor, torch.Tensor]]:
        """Return a function that gives inputs, targets and mask of the batches in a step, ``(K, B, ...)``."""
        x, x_starts_K = self._inputs([work.examples.x for work in job.work[group]])
        y, y_starts_K = self._concatenate([work.examples.y for work in job.work[group]])

        plan_KSB = torch.from_numpy(job.plan_KSB[group]).to(self.model.device)

        def batch_of(s: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
            rows_KB = plan_KSB[:, s].long()
            return _rows(x, x_starts_K, rows_KB), _targets(y, y_starts_K, rows_KB), rows_KB >= 0

        return batch_of

    def _block_gradients(self, job: Job, group: slice) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """Return the gradient function of clients that step together."""
        if job.local.example_dp:
            return self._private_gradients(job, job.work[group])
        gradient_of: BlockGradient = partial(self._client_gradient, job)
        if job.local.micro_batch_size is not None:
            gradient_of = partial(_split_gradient, gradient_of, job.local.micro_batch_size)
        if job.rule.gradient is not None:
            gradient_of = partial(_rule_gradient, job, gradient_of)
        clients = range(len(job.work))[group]
        inputs_K = _stack([self.losses.inputs_of(job, k) for k in clients]) if job.changes_loss else {}
        vectors_K = _stack([job.state_of(job.work[k]) for k in clients]) if job.rule.gradient else {}

        def gradients(params_KD: torch.Tensor, *batch_KB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.func.vmap(gradient_of)(params_KD, inputs_K, vectors_K, *batch_KB)

        return gradients

    def _client_gradient(
        self,
        job: Job,
        params_D: torch.Tensor,
        inputs: RuleInputs,
        vectors: Mapping[str, torch.Tensor],
        *batch_B: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of the mean loss of one client, and its total loss."""
        losses = partial(self.losses.changed, job, inputs) if job.changes_loss else self.losses.plain
        mean_loss = partial(self._mean_loss, self.losses.mixed(job, losses))
        return torch.func.grad(mean_loss, has_aux=True)(params_D, *batch_B)

    def _private_gradients(
        self, job: Job, work: Sequence[ClientWork]
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """Return the gradient function of DP-SGD for clients that step together."""
        dp = job.request.local.example_dp
        assert dp is not None
        std = dp.clip * dp.noise_multiplier
        noises = [GridNoise(job.request, client_work, std, self.model.device) for client_work in work] if std else []
        expected_K = [min(job.request.local.batch_size, len(client_work.examples)) for client_work in work]
        expected_K1 = torch.tensor(expected_K, device=self.model.device)[:, None]

        def gradients(params_KD: torch.Tensor, *batch_KB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sum_KD, loss_K = torch.func.vmap(partial(self._clipped_sum, dp.clip))(params_KD, *batch_KB)
            if noises:
                noisy_KD = torch.empty_like(sum_KD, dtype=noises[0].dtype)
                for noise, row_D in zip(noises, noisy_KD, strict=True):
                    noise.draw_(row_D)
                step = noises[0].step
                sum_KD = noisy_KD.add_(sum_KD, alpha=1 / step).round_().mul_(step).float()
            return sum_KD / expected_K1, loss_K

        return gradients

    def _clipped_sum(
        self, clip: float, params_D: torch.Tensor, x_B: Any, y_B: torch.Tensor, real_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the clipped gradients of the real examples of a batch, and the sum of their losses."""

        def loss_of(params_D: torch.Tensor, x: Any, y: torch.Tensor) -> torch.Tensor:
            return self.losses.loss(self.model.apply(params_D, with_axis(x)), y[None])[0]

        per_example = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0))
        gradient_BD, loss_B = per_example(params_D, x_B, y_B)
        norm_B = torch.linalg.vector_norm(gradient_BD, dim=1)
        counts_B = real_B & torch.isfinite(norm_B)
        factor_B = torch.where(counts_B, clip / norm_B.clamp(min=clip), 0.0)
        finite_BD = torch.where(counts_B[:, None], gradient_BD, 0.0)
        return factor_B @ finite_BD, torch.where(counts_B, loss_B, 0.0).detach().sum()

    def _mean_loss(
        self, losses: Losses, params_D: torch.Tensor, x_B: Any, y_B: torch.Tensor, real_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and sum of the loss over the real examples of a batch."""
        loss_B = torch.where(real_B, losses(partial(self.model.apply, params_D), x_B, y_B, real_B), 0.0)
        return loss_B.sum() / real_B.sum().clamp(min=1), loss_B.detach().sum()

    def _inputs(self, arrays: Sequence[np.ndarray]) -> tuple[Any, torch.Tensor]:
        """Return the inputs of K clients together, and the first row of each client, ``(K, 1)``.

        Slices of one array stay on the device between rounds. Other inputs are concatenated in each round.
        """
        whole, starts_K = shared_base_array(arrays)
        if whole is None:
            return self._concatenate(arrays)
        if self._resident is None or self._resident[0] is not whole:
            self._resident = whole, self.model.inputs(whole)
        return self._resident[1], torch.from_numpy(starts_K).to(self.model.device)[:, None]

    def _concatenate(self, arrays: Sequence[np.ndarray]) -> tuple[Any, torch.Tensor]:
        starts_K = np.cumsum([0, *map(len, arrays[:-1])])
        return self.model.inputs(np.concatenate(arrays)), torch.from_numpy(starts_K).to(self.model.device)[:, None]


def _rows(arrays: Any, starts_K1: torch.Tensor, rows_KB: torch.Tensor) -> Any:
    """Return rows of clients. Padding repeats their first example, because zeros can be no valid inputs of a model.

    Args:
        arrays: tensors of all clients.
        starts_K1: first row of each client.
        rows_KB: rows, counted from the first of a client; -1 is padding.
    """
    places_KB = starts_K1 + rows_KB.clamp(min=0)
    return map_inputs(lambda part: part.index_select(0, places_KB.view(-1)).unflatten(0, places_KB.shape), arrays)


def _targets(y: torch.Tensor, starts_K1: torch.Tensor, rows_KB: torch.Tensor) -> torch.Tensor:
    """Return targets of clients. Padding is 0: a loss over the batch, as for survival, must not see its event."""
    real_KB = (rows_KB >= 0).reshape(*rows_KB.shape, *(1,) * (y.ndim - 1))
    targets: torch.Tensor = _rows(y, starts_K1, rows_KB)
    return targets.where(real_KB, targets.new_zeros(()))


def _stack(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the values of K clients by name, ``(K, ...)``."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _rule_gradient(
    job: Job,
    gradient_of: BlockGradient,
    params_D: torch.Tensor,
    inputs: RuleInputs,
    vectors: Mapping[str, torch.Tensor],
    *batch_B: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the local rule, and the total loss of its first gradient."""
    assert job.rule.gradient is not None
    totals: list[torch.Tensor] = []

    def gradient_at(point_D: torch.Tensor) -> torch.Tensor:
        gradient_D, total = gradient_of(point_D, inputs, vectors, *batch_B)
        totals.append(total)
        return gradient_D

    return job.rule.gradient(gradient_at, params_D, job.global_D, **vectors, **job.broadcast), totals[0]


def _split_gradient(
    gradient_of: BlockGradient,
    size: int,
    params_D: torch.Tensor,
    inputs: RuleInputs,
    vectors: Mapping[str, torch.Tensor],
    *batch_B: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the mean loss and the total loss, with at most ``size`` examples per pass."""
    count, gradient_D, total = batch_B[-1].sum().clamp(min=1), torch.zeros_like(params_D), params_D.new_zeros(())
    x_B, *others = batch_B
    for batch_M in zip(divide(x_B, size), *(rows_B.split(size) for rows_B in others), strict=True):
        part_D, loss = gradient_of(params_D, inputs, vectors, *batch_M)
        gradient_D = gradient_D + part_D * (batch_M[-1].sum() / count)
        total = total + loss
    return gradient_D, total
