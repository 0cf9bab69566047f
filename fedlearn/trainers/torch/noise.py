"""Add Gaussian noise to sums of clipped gradients in PyTorch, on the grid of `fedlearn.core.noise_grid`.

Shapes: D parameters.
"""

from __future__ import annotations

import torch

from fedlearn.core.noise_grid import grid_step
from fedlearn.core.random import Purpose, integer_seed, secret_normals
from fedlearn.core.records import ClientWork, Request
from fedlearn.trainers.batching import round_of


class GridNoise:
    """Add noise to sums of one client in place, and round the result to the grid.

    Sums and noise of real clients are float64, from the operating system. Noise of a simulation follows from the seed,
    and is float32, which is faster.

    Args:
        request: seed, round and run mode.
        work: client.
        std: standard deviation of the noise, > 0.
        device: device of the sums.
    """

    def __init__(self, request: Request, work: ClientWork, std: float, device: str) -> None:
        self.std, self.step, self._generator = std, grid_step(std), None
        self.dtype = torch.float64 if request.deployed else torch.float32
        if not request.deployed:
            self._generator = torch.Generator(device)
            seed = integer_seed(request.seed, Purpose.NOISE, round=round_of(request, work), client=work.client)
            self._generator.manual_seed(seed)

    def draw_(self, values: torch.Tensor) -> torch.Tensor:
        """Fill a tensor of `dtype` with noise, in units of the grid step."""
        if self._generator is None:
            values.copy_(torch.from_numpy(secret_normals(tuple(values.shape))))
        else:
            values.normal_(generator=self._generator)
        return values.mul_(self.std / self.step)
