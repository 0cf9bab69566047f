"""From the updates of many clients to one: folds, so that a mean streams and a robust rule may stack.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from fedlearn.errors import require
from fedlearn.layout import Layout
from fedlearn.records import Array, Memory, Updates

WEIGHTINGS = ("examples", "equal")


class Aggregator(NamedTuple):
    """A fold over blocks of updates.

    Attributes:
        init: the empty fold.
        add: take in one block; may reuse the memory it is given.
        done: ``update_D`` of all that was added.
        sensitivity: how far the result moves, at most, when one client's clipped update changes:
            ``(clip_norm, cohort_size) -> float``; None if unknown, so that no privacy claim may rest on it.
        sums: whether the result is a (weighted) sum of updates; masking needs one.
    """

    init: Callable[[Layout], Memory]
    add: Callable[[Memory, Updates], Memory]
    done: Callable[[Memory], Array]
    sensitivity: Callable[[float, int], float] | None = None
    sums: bool = False


def add_rows(total: Any, rows_KD: Array, weights_K: np.ndarray) -> Any:
    """``total + sum_k weights_k rows_k``, one row after another in float64 (in compensated float32 in JAX).

    ``total`` is None or what an earlier call returned; hand it to `value`. Adding row by row makes the result
    independent of how the cohort was cut into blocks, bit for bit.
    """
    xp = array_namespace(rows_KD)
    if is_jax_array(rows_KD):
        return _add_rows_compensated(xp, total, rows_KD, weights_K)
    sum_D = xp.zeros(rows_KD.shape[1:], dtype=xp.float64, device=rows_KD.device) if total is None else total
    for row_D, weight in zip(rows_KD, weights_K.tolist(), strict=True):
        sum_D += weight * xp.astype(row_D, xp.float64)
    return sum_D


def _add_rows_compensated(xp: Any, total: Any, rows_KD: Array, weights_K: np.ndarray) -> Any:
    """Neumaier's summation: JAX has no float64 unless a global flag turns it on."""
    sum_D, lost_D = total or (xp.zeros_like(rows_KD[0]), xp.zeros_like(rows_KD[0]))
    for k, weight in enumerate(weights_K.tolist()):
        term_D = weight * rows_KD[k]
        new_D = sum_D + term_D
        larger = xp.abs(sum_D) >= xp.abs(term_D)
        lost_D = lost_D + xp.where(larger, (sum_D - new_D) + term_D, (term_D - new_D) + sum_D)
        sum_D = new_D
    return sum_D, lost_D


def value(total: Any, divisor: float) -> Array:
    """The float32 vector ``total / divisor`` of a sum made by `add_rows`."""
    if isinstance(total, tuple):
        return (total[0] + total[1]) / divisor
    xp = array_namespace(total)
    return xp.astype(total / divisor, xp.float32)


def mean(*, weighting: str = "examples") -> Aggregator:
    """The mean of updates, weighted by training examples or equally.

    Guarantees: independent of the order of blocks' boundaries; lies in the convex hull of the updates; exact when all
    updates are equal. With equal weights one client moves it by at most ``2 clip / cohort``.

    Reference: McMahan, Moore, Ramage, Hampson, Agüera y Arcas, *Communication-Efficient Learning of Deep Networks from
    Decentralized Data*, AISTATS 2017, arXiv:1602.05629.
    """
    expected = f"one of {', '.join(WEIGHTINGS)}"
    require(weighting in WEIGHTINGS, "weighting", weighting, expected, "weighting=examples")

    def add(memory: Memory, updates: Updates) -> Memory:
        equal = weighting == "equal"
        weights_K = np.ones(len(updates)) if equal else updates.num_examples_K.astype(np.float64)
        total = add_rows(memory["total"], updates.delta_KD, weights_K)
        return {"total": total, "weight": memory["weight"] + float(weights_K.sum())}

    return Aggregator(
        init=lambda layout: {"total": None, "weight": 0.0},
        add=add,
        done=lambda memory: value(memory["total"], memory["weight"]),
        sensitivity=(lambda clip, cohort: 2 * clip / cohort) if weighting == "equal" else None,
        sums=True,
    )


def stacked(rule: Callable[[Array, np.ndarray], Array]) -> Aggregator:
    """An aggregator from a rule that wants all updates at once: ``rule(updates_KD, num_examples_K) -> update_D``."""

    def add(memory: Memory, updates: Updates) -> Memory:
        return {"blocks": [*memory["blocks"], updates]}

    def done(memory: Memory) -> Array:
        blocks = memory["blocks"]
        xp = array_namespace(blocks[0].delta_KD)
        updates_KD = xp.concat([block.delta_KD for block in blocks]) if len(blocks) > 1 else blocks[0].delta_KD
        return rule(updates_KD, np.concatenate([block.num_examples_K for block in blocks]))

    return Aggregator(init=lambda layout: {"blocks": []}, add=add, done=done)
