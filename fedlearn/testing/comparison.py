"""Compare arrays of any library."""

from __future__ import annotations

from typing import Any

import numpy as np


def is_close(a: Any, b: Any, tolerance: float) -> bool:
    """Return whether the largest absolute difference is at most ``tolerance``."""
    return bool(np.allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance))


def installed_array_libraries() -> list[Any]:
    """Return the conversions from NumPy into torch and JAX arrays, for each library that is installed."""
    found: list[Any] = []
    try:
        import torch

        found.append(torch.from_numpy)
    except ImportError:
        pass
    try:
        import jax.numpy as jnp

        found.append(jnp.asarray)
    except ImportError:
        pass
    return found
