"""How local training departs from plain SGD: one definition for torch and JAX.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedlearn.records import Array, Memory


def _gradient(grad: Any, w: Any, w_global: Any) -> Any:
    return grad


def _nothing(delta_KD: Array, num_steps_K: Array, learning_rate: float) -> tuple[Memory, Mapping[str, Array]]:
    return {}, {}


class LocalRule(NamedTuple):
    """A departure from plain local SGD.

    Attributes:
        correct: ``(grad, w, w_global, **vectors) -> grad``, arithmetic only, applied to torch tensors and JAX arrays
            of any shape at each local step, before the optimiser; ``vectors`` are the memories and broadcasts named
            below, by name.
        memory: names of the D-vectors that each client keeps for itself; zero before its first round.
        receives: names of the D-vectors that the server broadcasts (see `Transform.broadcast`).
        finish: ``(delta_KD, num_steps_K, learning_rate, **vectors) -> (new memory, what else to send)``, K x D each,
            on array-API arrays, after training; broadcasts come as D.
    """

    correct: Callable[..., Any] = _gradient
    memory: tuple[str, ...] = ()
    receives: tuple[str, ...] = ()
    finish: Callable[..., tuple[Memory, Mapping[str, Array]]] = _nothing


plain = LocalRule()


def proximal(mu: float) -> LocalRule:
    """Pull local parameters towards the global ones: the gradient of ``mu / 2 * ||w - w_global||^2`` is added."""
    return LocalRule(correct=lambda grad, w, w_global: grad + mu * (w - w_global))
