"""Compare arrays of any library."""

from __future__ import annotations

from typing import Any

import numpy as np


def is_close(a: Any, b: Any, tolerance: float) -> bool:
    """Return whether the largest absolute difference is at most ``tolerance``."""
    return bool(np.allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance))


def installed_array_libraries() -> list[Any]:
    """Return the functions that convert NumPy arrays to torch and JAX, for installed libraries."""
    conversions: list[Any] = []
    try:
        import torch

        conversions.append(torch.from_numpy)
    except ImportError:
        pass
    try:
        import jax.numpy as jnp

        conversions.append(jnp.asarray)
    except ImportError:
        pass
    return conversions
