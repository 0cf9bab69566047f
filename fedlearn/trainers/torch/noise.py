"""Add Gaussian noise to sums of clipped gradients in PyTorch, on the grid of `fedlearn.core.noise_grid`.

Shapes: D parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedlearn.core.noise_grid import grid_step
from fedlearn.core.random import Purpose, integer_seed, secret_normals
from fedlearn.core.records import ClientWork, Request
from fedlearn.trainers.batching import round_of

Normals = Callable[[torch.Tensor], object]  # fills a float64 tensor with standard normal numbers


def normal_source(request: Request, work: ClientWork, device: str) -> Normals:
    """Return a function that fills a float64 tensor with standard normal numbers.

    Real clients use numbers from the operating system, which do not follow from a seed.
    """
    if request.deployed:
        return lambda noise_D: noise_D.copy_(torch.from_numpy(secret_normals(tuple(noise_D.shape))))
    generator = torch.Generator(device)
    generator.manual_seed(integer_seed(request.seed, Purpose.NOISE, round=round_of(request, work), client=work.client))
    # a simulation draws in float32, which is twice as fast
    return lambda noise_D: noise_D.copy_(torch.empty(noise_D.shape, device=device).normal_(generator=generator))


def round_to_grid_(values: torch.Tensor, std: float) -> torch.Tensor:
    """Round float64 values in place to the nearest multiples of the grid step.

    Args:
        values: noisy sums, float64. They must be below 2^30 standard deviations.
        std: standard deviation of the noise, > 0.
    """
    shift = 1.5 * 2.0**52 * grid_step(std)  # float64 numbers of this size are multiples of the grid step
    return values.add_(shift).sub_(shift)
