"""Round noisy sums to a grid, so that the gaps between floating point numbers reveal nothing.

A sampler can return only some floating point numbers, and the gaps between them can reveal the summands. Noisy sums are
therefore computed in float64 and rounded to multiples of a power of two that is at most 2^-20 standard deviations.

Reference: Mironov, *On Significance of the Least Significant Bits for Differential Privacy*, CCS 2012.
"""

from __future__ import annotations

from math import floor, log2

import numpy as np

GRID_BITS = 20  # the grid step is at most 2^-GRID_BITS standard deviations


def grid_step(std: float) -> float:
    """Return the largest power of two that is at most ``std * 2^-20``.

    Args:
        std: standard deviation of the noise, > 0.
    """
    return float(2.0 ** (floor(log2(std)) - GRID_BITS))


def round_to_grid(values: np.ndarray, std: float) -> np.ndarray:
    """Round to the nearest multiples of the grid step.

    Args:
        values: noisy numbers, float64.
        std: standard deviation of the noise, > 0.

    >>> round_to_grid(np.array([0.3]), 1.0) * 2**20
    array([314573.])
    """
    step = grid_step(std)
    return np.round(values / step) * step
