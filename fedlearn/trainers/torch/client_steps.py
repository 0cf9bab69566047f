"""Take the local steps of clients in PyTorch, one client after another.

Shapes: K clients in a block, D parameters, S local steps, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from fedlearn.algorithm.local_rule import LocalRule, plain_training
from fedlearn.core.optimizers import STATE_PREFIX, STEPS
from fedlearn.core.random import Purpose, integer_seed
from fedlearn.core.records import ClientWork, Request
from fedlearn.trainers.batching import round_of
from fedlearn.trainers.example_keys import example_keys
from fedlearn.trainers.torch.dp_sgd import ClippedGradient
from fedlearn.trainers.torch.flat_model import FlatModel
from fedlearn.trainers.torch.job import Job
from fedlearn.trainers.torch.network import divide, take
from fedlearn.trainers.torch.noise import GridNoise
from fedlearn.trainers.torch.optimizers import Gradients, KeptState, clip_gradients, optimizer_step
from fedlearn.trainers.torch.point_gradients import PointGradients
from fedlearn.trainers.torch.random import restored_generators
from fedlearn.trainers.torch.rule_losses import Losses, TrainingLosses

# (x_B, y_B, rows_B) -> gradients, loss_B
GradientOf = Callable[[Any, torch.Tensor, torch.Tensor], tuple[Gradients, torch.Tensor]]
ClippedGradients = Callable[..., ClippedGradient]  # (clip=...) -> gradient of DP-SGD

STEP_BITS = 40  # each local step has 2^40 numbers of the stream of an example


class ClientSteps:
    """Train clients one after another, in the memory of one model.

    Args:
        model: the model.
        losses: losses of examples in training.
        clipped: returns the gradient of DP-SGD for a clip norm.
    """

    def __init__(self, model: FlatModel, losses: TrainingLosses, clipped: ClippedGradients) -> None:
        self.model, self.losses, self.clipped = model, losses, clipped
        self._masks: dict[int, torch.Tensor] = {}  # by size of the batch

    def fit(self, job: Job, states: list[dict[str, np.ndarray]]) -> tuple[torch.Tensor, np.ndarray]:
        """Train one client after another. Return the updates and the total losses, and append optimizer states."""
        shape, delta_KD = (len(job.work), self.model.layout.num_parameters), None
        losses_K, request = np.zeros(len(job.work)), job.request
        # torch.manual_seed records a traceback for each absent kind of device, which takes longer than a small step
        set_seed = torch.default_generator.manual_seed if self.model.device == "cpu" else torch.manual_seed
        for k, work in enumerate(job.work):
            with restored_generators(self.model.device):
                set_seed(integer_seed(request.seed, Purpose.MODEL, round=round_of(request, work), client=work.client))
                losses_K[k] = self._fit_client(job, k, states)
            if len(job.work) == 1 and self.model.lends:
                return self.model.lend(job.start(work)), losses_K
            if delta_KD is None:  # only now, so that it can have the memory of the gradients
                delta_KD = torch.empty(shape, device=self.model.device)
            torch.sub(self.model.flat_D, job.start(work), out=delta_KD[k])
        assert delta_KD is not None
        return delta_KD, losses_K

    def _fit_client(self, job: Job, k: int, states: list[dict[str, np.ndarray]]) -> float:
        """Train one client. Leave the result in the flat vector, and return the total loss."""
        work, weights = job.work[k], [leaf.detach() for leaf in self.model.leaves]
        vectors = {name: self.model.split(v_D) for name, v_D in job.vectors(work).items()}
        self.model.flat_D.copy_(job.start(work))
        self.model.reset_counters()
        flat, kept = self._kept_state(job.rule, work)
        step, max_norm = optimizer_step(self.model.leaves, job.local, kept), job.local.max_grad_norm
        gradient_of = self._client_gradient(job, k)
        x, y = self.model.inputs(work.examples.x), self.model.to_device(work.examples.y)
        total = torch.zeros((), device=self.model.device)
        for rows_B, rate in zip(job.plan_KSB[k, : job.steps_K[k]], job.rates(k), strict=False):
            batch = torch.from_numpy(rows_B[rows_B >= 0]).to(self.model.device)
            gradients, loss_B = gradient_of(take(x, batch), y.index_select(0, batch), batch)
            total += loss_B.sum()
            if max_norm is not None:
                gradients = clip_gradients(max_norm, gradients)
            if job.rule.correct is not plain_training.correct:
                gradients = correct_gradients(job.rule, gradients, weights, vectors)
            step(gradients, rate)
            del gradients  # before the next gradients, which need the same memory
        if kept is not None:
            vectors_D = {name: v_D.cpu().numpy() for name, v_D in flat.items()}
            states.append({**vectors_D, STEPS: kept.counts[0].reshape(1).cpu().numpy()})
        return float(total)

    def _kept_state(self, rule: LocalRule, work: ClientWork) -> tuple[dict[str, torch.Tensor], KeptState | None]:
        """Return a copy of the optimizer state that a client has kept, as flat vectors and as parts of them."""
        if not rule.optimizer_state:
            return {}, None
        flat = {name: self.model.to_device(work.client_state[name]).clone() for name in rule.optimizer_state}
        steps = float(np.asarray(work.client_state[STEPS])[0])
        vectors = {name.removeprefix(STATE_PREFIX): self.model.split(v_D) for name, v_D in flat.items()}
        return flat, KeptState(vectors=vectors, counts=[torch.tensor(steps) for _ in self.model.leaves])

    def _client_gradient(self, job: Job, k: int) -> GradientOf:
        """Return the gradient function of a client."""
        if job.local.example_dp:
            return self._private_gradient(job, job.work[k])
        changed = partial(self.losses.changed, job, self.losses.inputs_of(job, k)) if job.changes_loss else None
        losses = self.losses.mixed(job, changed or self.losses.plain)
        size = job.local.micro_batch_size
        gradient_of: GradientOf = partial(self.gradient, losses=losses)
        if size is not None:
            gradient_of = partial(self._split_gradient, losses, size)
        return gradient_of if job.rule.gradient is None else partial(self._rule_gradient, job, job.work[k], gradient_of)

    def gradient(
        self, x_B: Any, y_B: torch.Tensor, rows_B: torch.Tensor, *, losses: Losses
    ) -> tuple[Gradients, torch.Tensor]:
        """Return the gradient of the mean loss, and the loss of each example."""
        x_B = self.model.module.trimmed(x_B)
        loss_B = losses(self.model.module, x_B, y_B, self._full_mask(len(y_B)))
        mean = torch.dot(
            loss_B, loss_B.new_full(loss_B.shape, 1 / len(loss_B))
        )  # a scalar: torch then imports no sympy
        return torch.autograd.grad(mean, self.model.leaves, materialize_grads=True), loss_B.detach()

    def _full_mask(self, size: int) -> torch.Tensor:
        """Return the mask of a batch without padding. Batches of one size share it, because steps are short."""
        if size not in self._masks:
            self._masks[size] = torch.ones(size, dtype=torch.bool, device=self.model.device)
        return self._masks[size]

    def _split_gradient(
        self, losses: Losses, size: int, x_B: Any, y_B: torch.Tensor, rows_B: torch.Tensor
    ) -> tuple[Gradients, torch.Tensor]:
        """Return the gradient of the mean loss, with at most ``size`` examples per forward pass."""
        sums, parts = None, []
        for x_M, y_M, rows_M in zip(divide(x_B, size), y_B.split(size), rows_B.split(size), strict=True):
            gradients, loss_M = self.gradient(x_M, y_M, rows_M, losses=losses)
            weighted = torch._foreach_mul(gradients, len(y_M) / len(y_B))
            sums = weighted if sums is None else torch._foreach_add(sums, weighted)
            parts.append(loss_M)
        assert sums is not None
        return tuple(sums), torch.cat(parts)

    def _rule_gradient(
        self,
        job: Job,
        work: ClientWork,
        gradient_of: GradientOf,
        x_B: Any,
        y_B: torch.Tensor,
        rows_B: torch.Tensor,
    ) -> tuple[Gradients, torch.Tensor]:
        """Return the gradient of the local rule, and the losses of its first gradient."""
        assert job.rule.gradient is not None
        points = PointGradients(self.model, lambda: gradient_of(x_B, y_B, rows_B))
        grad_D = job.rule.gradient(points.gradient_at, points.start_D, job.global_D, **job.rule_vectors(work))
        points.restore()
        return tuple(self.model.split(grad_D)), points.loss_B

    def _private_gradient(self, job: Job, work: ClientWork) -> GradientOf:
        """Return the gradient function of DP-SGD: the sum of clipped gradients plus noise, over the expected batch."""
        dp = job.request.local.example_dp
        assert dp is not None
        clipped, steps, std = self.clipped(clip=dp.clip), count(), dp.clip * dp.noise_multiplier
        keys_N = self._example_keys(job.request, work) if clipped.needs_keys else None
        expected = min(job.request.local.batch_size, len(work.examples))
        noise = GridNoise(job.request, work, std, self.model.device) if std else None
        noisy_D = torch.empty_like(self.model.flat_D, dtype=noise.dtype if noise else torch.float32)
        parts = self.model.split(noisy_D)

        def gradient_of(x_B: Any, y_B: torch.Tensor, rows_B: torch.Tensor) -> tuple[Gradients, torch.Tensor]:
            keys_B = None if keys_N is None else keys_N[rows_B]
            sums, loss_B = clipped(x_B, y_B, keys_B=keys_B, start=next(steps) << STEP_BITS)
            if noise is None:
                return torch._foreach_div(sums, expected), loss_B
            noise.draw_(noisy_D)
            torch._foreach_add_(parts, sums, alpha=1 / noise.step)  # in grid steps
            noisy_D.round_().mul_(noise.step / expected)
            return tuple(parts if noisy_D.dtype == torch.float32 else self.model.split(noisy_D.float())), loss_B

        return gradient_of

    def _example_keys(self, request: Request, work: ClientWork) -> torch.Tensor:
        """Return the key of each example of a client for its random draws, int64."""
        return self.model.to_device(example_keys(request, work, Purpose.MODEL).view(np.int64))


def correct_gradients(
    rule: LocalRule,
    gradients: Gradients,
    weights: Sequence[torch.Tensor],
    vectors: Mapping[str, Sequence[torch.Tensor]],
) -> Gradients:
    """Apply the local rule to the gradient of each parameter."""
    names, leaves = list(vectors), zip(*vectors.values(), strict=True)
    return tuple(
        rule.correct(gradient, weight, **dict(zip(names, parts, strict=True)))
        for gradient, weight, parts in zip(gradients, weights, leaves, strict=True)
    )
