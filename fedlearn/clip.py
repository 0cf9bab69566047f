"""Norm bounds on updates.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from array_api_compat import array_namespace

from fedlearn.errors import is_number, require
from fedlearn.records import Array, Memory
from fedlearn.transform import Context, Stage, Transform


def clip_norm(update: Array, bound: float) -> Array:
    """Scale each vector of ``(..., D)`` down to an L2 norm of at most ``bound``; shorter ones stay as they are.

    Guarantees: idempotent up to rounding; zero stays zero; NaN stays NaN (the client step refuses it before).
    """
    xp = array_namespace(update)
    norm = xp.linalg.vector_norm(update, axis=-1, keepdims=True)
    return update * (bound / xp.where(norm > bound, norm, xp.full_like(norm, bound)))


def clip(bound: float) -> Stage:
    """Bound the L2 norm of every update on the client. Bounds influence; protects no one by itself."""
    positive = is_number(bound, at_least=0) and 0 < bound < float("inf")
    require(positive, "clip", bound, "a finite number > 0", "clip=1.0")

    def update(update: Array, memory: Memory, context: Context) -> tuple[Array, Memory]:
        return clip_norm(update, bound), memory

    return Stage(client=Transform(update=update), contracts=True, clips=True)
