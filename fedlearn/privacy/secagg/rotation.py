"""A random rotation that spreads a vector evenly over its coordinates, so that fewer bits hold each of them.

Shapes: K clients in a block, D numbers in a vector, P the next power of two.
"""

from __future__ import annotations

from math import log, sqrt

import numpy as np

FAILURE_PROBABILITY = 1e-9  # how likely it may be that the rotation leaves any number of a vector beyond its bound


def next_power_of_two(length: int) -> int:
    """The next power of two."""
    return 1 << (length - 1).bit_length()


def max_flattening(length: int) -> float:
    """How much smaller than its norm every number of a rotated vector is, at least, with probability 1 - 1e-9.

    A rotated number is sub-Gaussian with variance ``norm**2 / P``; this is the union bound over all P.
    """
    size = next_power_of_two(length)
    return sqrt(size / (2 * log(2 * size / FAILURE_PROBABILITY)))


def rotate(x_KD: np.ndarray, signs_P: np.ndarray) -> np.ndarray:
    """``H S x / sqrt(P)`` on each row: random signs, then the Walsh-Hadamard matrix; keeps the norm.

    Reference: Kairouz, Liu, Steinke, arXiv:2102.06387, Section 4; Suresh, Yu, Kumar, McMahan, *Distributed Mean
    Estimation with Limited Communication*, ICML 2017, arXiv:1611.00429.
    """
    x_KP = np.zeros((len(x_KD), len(signs_P)))
    x_KP[:, : x_KD.shape[1]] = x_KD
    return _hadamard(x_KP * signs_P)


def unrotate(y_P: np.ndarray, signs_P: np.ndarray, length: int) -> np.ndarray:
    """The inverse of `rotate`, on one vector."""
    return (_hadamard(y_P[None].astype(np.float64))[0] * signs_P)[:length]


def _hadamard(x_KP: np.ndarray) -> np.ndarray:
    """``H x / sqrt(P)`` by the fast transform, O(P log P); its own inverse."""
    size, half = x_KP.shape[1], 1
    x_KP = x_KP / sqrt(size)
    while half < size:
        pairs = x_KP.reshape(len(x_KP), -1, 2, half)
        above, below = pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]
        pairs[:, :, 0], pairs[:, :, 1] = above, below
        half *= 2
    return x_KP
