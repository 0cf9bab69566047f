"""Take the local steps of clients over one frozen base: each pass has rows of several clients.

Shapes: K clients in a block, D parameters, B batch with padding, N rows of all clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fedlearn.core.layout import Layout
from fedlearn.errors import SettingError
from fedlearn.trainers.torch.block_steps import BlockSteps
from fedlearn.trainers.torch.flat_model import FlatModel
from fedlearn.trainers.torch.frozen_layers import FrozenLayers
from fedlearn.trainers.torch.frozen_prefix import FrozenPrefix
from fedlearn.trainers.torch.job import Job
from fedlearn.trainers.torch.joint_layers import JointLayers
from fedlearn.trainers.torch.network import first_of, rows_of
from fedlearn.trainers.torch.rule_losses import Losses, TrainingLosses

# inputs of a pass on a CPU, e.g. tokens, or the batch of a client: 1024 are 10 % faster, and need twice the memory
MAX_POSITIONS = 256
CHECK_SCALE, CHECK_TOLERANCE = 0.02, 1e-3  # change of the parameters in the check; largest relative difference


class JointSteps(BlockSteps):
    """Train a block of clients together, with one forward pass for rows of several clients.

    Rows of similar length share a pass, so a pass has less padding than the batch of a client.

    Args:
        model: the model.
        losses: losses of examples in training.
    """

    def __init__(self, model: FlatModel, losses: TrainingLosses) -> None:
        super().__init__(model, losses)
        self.layers, self._is_checked = JointLayers(model), False
        self.prefix, self.frozen = FrozenPrefix(model), FrozenLayers(model.module, model.device)

    def require_separate_layers(self, *, draws: bool, layout: Layout) -> None:
        """Refuse a model that cannot train several clients in one pass.

        Args:
            draws: whether the model draws random numbers in training.
            layout: layout of the model.

        Raises:
            SettingError: A trained parameter is outside of linear layers, or the model has statistics or draws.
        """
        reason = "keeps buffers" if layout.buffers else "draws random numbers" if draws else self.layers.reason
        if reason:
            raise _refusal(reason)

    def fit(self, job: Job) -> tuple[torch.Tensor, np.ndarray]:
        """Train all clients together. The first call compares the gradients of two clients with passes of their own.

        Raises:
            SettingError: The gradients differ, because the model mixes the examples of a batch.
        """
        if not self._is_checked and self._mixes_examples(job):
            raise _refusal("mixes the examples of a batch")
        self._is_checked = True
        return super().fit(job)

    def _mixes_examples(self, job: Job) -> bool:
        """Return whether the first gradients of two clients differ from passes of their own, at random parameters."""
        pair = slice(0, 2)
        x, y, real_KB = self._batches(job, pair)(0)
        noise = torch.Generator().manual_seed(1)
        start_KD = torch.stack([job.start(work) for work in job.work[pair]])
        draws_KD = torch.randn(start_KD.shape, generator=noise).to(start_KD)
        start_KD = start_KD + CHECK_SCALE * draws_KD
        gradients = self._block_gradients(job, pair)
        alone_KD = torch.stack([self._alone(job, start_KD[k], x, y, real_KB, k) for k in range(len(start_KD))])
        most = CHECK_TOLERANCE * float(alone_KD.abs().max())
        together_KD = gradients(start_KD, x, y, real_KB)[0]
        if self.prefix.is_active:  # the second call skips frozen blocks
            again_KD = gradients(start_KD, x, y, real_KB)[0]
            self.prefix.is_active = float((together_KD - again_KD).abs().max()) <= most
        return not float((together_KD - alone_KD).abs().max()) <= most

    def _alone(
        self, job: Job, params_D: torch.Tensor, x: Any, y: torch.Tensor, real_KB: torch.Tensor, k: int
    ) -> torch.Tensor:
        """Return the gradient of one client, from a pass of its own."""
        self.model.load(params_D)
        real_B = real_KB[k]
        x_B, y_B = rows_of(rows_of(x, k), real_B), y[k][real_B]
        losses = self.losses.mixed(job, self.losses.plain)
        loss_B = losses(self.model.module, x_B, y_B, real_B[real_B])
        return self.model.join(torch.autograd.grad(loss_B.mean(), self.model.leaves, materialize_grads=True))

    def _block_gradients(self, job: Job, group: slice) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        losses = self.losses.mixed(job, self.losses.plain)

        def gradients(
            params_KD: torch.Tensor, x_KB: Any, y_KB: torch.Tensor, real_KB: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            clients_N, places_N = real_KB.nonzero(as_tuple=True)
            x_N, y_N = rows_of(x_KB, (clients_N, places_N)), y_KB[clients_N, places_N]
            gradient_KD, total_K = torch.zeros_like(params_KD), params_KD.new_zeros(len(params_KD))
            share_K = 1 / real_KB.sum(dim=1).clamp(min=1)
            keys = self.prefix.keys(x_N) if self.prefix.is_active else []
            with self.frozen.using():
                for part_P in self._parts(x_N, keys, int(real_KB.sum(dim=1).max())):
                    clients_C, places_P = torch.unique(clients_N[part_P], return_inverse=True)
                    weights = self.layers.weights(params_KD[clients_C])
                    trained = [weight for weight in weights if weight.requires_grad]
                    part_keys = [keys[i] for i in part_P.tolist()] if keys else []
                    with self.layers.using(weights, places_P), self.prefix.using(part_keys):
                        loss_P = self._losses(losses, rows_of(x_N, part_P), y_N[part_P])
                        mean_loss = loss_P @ share_K[clients_N[part_P]]
                        parts = torch.autograd.grad(mean_loss, trained, materialize_grads=True)
                    self._add(gradient_KD, clients_C, parts)
                    total_K.index_add_(0, clients_N[part_P], loss_P.detach())
            return gradient_KD, total_K

        return gradients

    def _losses(self, losses: Losses, x_P: Any, y_P: torch.Tensor) -> torch.Tensor:
        ones_P = torch.ones(len(y_P), dtype=torch.bool, device=y_P.device)
        return losses(self.model.module, self.model.module.trimmed(x_P), y_P, ones_P)

    def _add(self, gradient_KD: torch.Tensor, clients_C: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> None:
        for leaf, part in zip(self.model.trained.leaves, parts, strict=True):
            gradient_KD[:, self.model.layout.slices[leaf.name]].index_add_(0, clients_C, part.flatten(1))

    def _parts(self, x_N: Any, keys: Sequence[bytes], largest_batch: int) -> Iterator[torch.Tensor]:
        """Yield the rows of each pass: rows of similar length, in order of their clients."""
        num_rows, lengths_N = len(first_of(x_N)), self.model.module.lengths(x_N)
        if self.model.device != "cpu":
            yield torch.arange(num_rows, device=self.model.device)
            return
        if lengths_N is None:
            lengths_N = torch.full((num_rows,), first_of(x_N)[0].numel())
        most = max(MAX_POSITIONS, largest_batch * int(lengths_N.max()))
        is_kept = [key in self.prefix for key in keys] or [False] * num_rows
        for value in (False, True):
            rows_M = torch.tensor([i for i in range(num_rows) if is_kept[i] is value], dtype=torch.long)
            yield from _passes(rows_M, lengths_N[rows_M], most)


def _passes(rows_M: torch.Tensor, lengths_M: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Yield rows of similar length, ascending, with at most ``most`` positions in total, or a single row."""
    order_M, first = torch.argsort(lengths_M, stable=True), 0
    widths = lengths_M[order_M].clamp(min=1).tolist()
    for end in range(1, len(widths) + 1):
        if end == len(widths) or widths[end] * (end + 1 - first) > most:
            yield rows_M[order_M[first:end]].sort().values
            first = end


def _refusal(reason: str) -> SettingError:
    """Return the error for a model whose clients cannot train together over one base."""
    return SettingError("batching", "joint", f"map, because the model {reason}", "batching=map")
