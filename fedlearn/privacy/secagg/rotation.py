"""Rotate vectors at random. Their coordinates become similar in size, so each one needs fewer bits.

Shapes: K clients in a block, D numbers in a vector, P the next power of two.
"""

from __future__ import annotations

from math import log, sqrt

import numpy as np

FAILURE_PROBABILITY = 1e-9  # largest probability that a number of a rotated vector exceeds its bound


def next_power_of_two(length: int) -> int:
    """Return the smallest power of two that is at least ``length``, for ``length`` >= 1."""
    return 1 << (length - 1).bit_length()


def max_flattening(length: int) -> float:
    """Return the largest factor by which all numbers of a rotated vector are smaller than its norm.

    The bound holds with probability 1 - 1e-9. A rotated number is sub-Gaussian with variance ``norm**2 / P``. The
    result is the union bound over all P numbers.

    Args:
        length: D, >= 1.
    """
    size = next_power_of_two(length)
    return sqrt(size / (2 * log(2 * size / FAILURE_PROBABILITY)))


def rotate(x_KD: np.ndarray, signs_P: np.ndarray) -> np.ndarray:
    """Return ``H S x / sqrt(P)`` for each row x, with random signs S and the Walsh-Hadamard matrix H.

    The rotation keeps the norm of each row.

    Args:
        x_KD: vectors, ``(K, D)``.
        signs_P: signs, 1.0 or -1.0, ``(P,)``.

    Returns:
        Rotated vectors, ``(K, P)``.

    Reference: Kairouz, Liu, Steinke, arXiv:2102.06387, Section 4; Suresh, Yu, Kumar, McMahan, *Distributed Mean
    Estimation with Limited Communication*, ICML 2017, arXiv:1611.00429.
    """
    x_KP = np.zeros((len(x_KD), len(signs_P)))
    x_KP[:, : x_KD.shape[1]] = x_KD
    return _hadamard(x_KP * signs_P)


def unrotate(y_P: np.ndarray, signs_P: np.ndarray, length: int) -> np.ndarray:
    """Return the inverse rotation of one vector, with its first ``length`` numbers; see `rotate`."""
    return (_hadamard(y_P[None].astype(np.float64))[0] * signs_P)[:length]


def _hadamard(x_KP: np.ndarray) -> np.ndarray:
    """Return ``H x / sqrt(P)`` by the fast transform in O(P log P). The transform is its own inverse."""
    size, half = x_KP.shape[1], 1
    x_KP = x_KP / sqrt(size)
    while half < size:
        pairs = x_KP.reshape(len(x_KP), -1, 2, half)
        sums, differences = pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]
        pairs[:, :, 0], pairs[:, :, 1] = sums, differences
        half *= 2
    return x_KP
