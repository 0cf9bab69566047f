"""Compute gradients of one batch at several points in PyTorch, for `fedlearn.LocalRule.gradient`.

Shapes: D parameters, B batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedlearn.trainers.torch.flat_model import FlatModel
from fedlearn.trainers.torch.optimizers import Gradients


class PointGradients:
    """Compute gradients of one batch at any parameters, in the memory of a model.

    All calls have the same random draws. Only the first call changes the buffers of the model.

    Args:
        model: the model.
        compute: returns gradients and losses at the current parameters of the model.

    Attributes:
        start_D: parameters and buffers at the start.
        loss_B: losses of the first call.
    """

    def __init__(self, model: FlatModel, compute: Callable[[], tuple[Gradients, torch.Tensor]]) -> None:
        self._model, self._compute = model, compute
        self.start_D = model.flat_D.clone()
        self.loss_B = torch.zeros(0)
        self._draws = self._random_state()
        self._buffers = model.buffer_state()
        self._is_first = True

    def gradient_at(self, params_D: torch.Tensor) -> torch.Tensor:
        """Return the gradient at these parameters, ``(D,)``, with 0 for buffers."""
        later = self._random_state()
        self._set_random_state(self._draws)
        self._model.flat_D.copy_(params_D)
        gradients, loss_B = self._compute()
        if self._is_first:
            self._is_first, self.loss_B, self._buffers = False, loss_B, self._model.buffer_state()
        else:
            self._set_random_state(later)
            self._model.set_buffers(self._buffers)
        return self._model.join(gradients)

    def restore(self) -> None:
        """Set the parameters to their values at the start, and the buffers to the values after the first call."""
        self._model.flat_D.copy_(self.start_D)
        self._model.set_buffers(self._buffers)

    def _random_state(self) -> torch.Tensor:
        is_cpu = self._model.device == "cpu"
        return torch.get_rng_state() if is_cpu else torch.cuda.get_rng_state(self._model.device)

    def _set_random_state(self, state: torch.Tensor) -> None:
        if self._model.device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, self._model.device)
