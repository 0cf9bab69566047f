"""Random numbers that nobody can repeat, from the operating system's cryptographic generator."""

from __future__ import annotations

import os

import numpy as np


def secret_uniforms(shape: tuple[int, ...]) -> np.ndarray:
    """Uniform in [0, 1): multiples of 2^-53, float64."""
    bits = np.frombuffer(os.urandom(8 * int(np.prod(shape))), np.uint64)
    return (bits >> np.uint64(11)).reshape(shape) * 2.0**-53


def secret_normals(shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal, float64, by Box and Muller; none lies beyond 8.7 standard deviations."""
    count = int(np.prod(shape))
    radius, angle = secret_uniforms((2, (count + 1) // 2))
    radius, angle = np.sqrt(-2 * np.log(radius + 2.0**-54)), 2 * np.pi * angle
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(shape)
