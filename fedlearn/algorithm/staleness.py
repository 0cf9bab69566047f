"""What makes a strategy asynchronous: how many clients are at work, and what an update is worth that comes late.

Shapes: K updates in a buffer.

Staleness is the number of steps that the server took between sending a client its model and getting its update: 0 for
the update of a model that is still the server's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedlearn.errors import is_count, is_number, require

StalenessWeight = Callable[[np.ndarray], np.ndarray]  # of staleness_K: weight_K


def unweighted(staleness_K: np.ndarray) -> np.ndarray:
    """Return the weight ``s(tau) = 1`` of each update."""
    return np.ones(len(staleness_K))


@dataclass(frozen=True, kw_only=True)
class Asynchrony:
    """Set the buffer and the concurrency of a server that steps as soon as its buffer is full.

    Whoever has answered is followed by another client, which gets the newest model; no client gets the same one twice.

    Args:
        buffer_size: updates in a step, >= 1.
        concurrency: clients at work at a time, >= 1; all where there are fewer.
        staleness_weight: ``s(tau_K)``, with which updates are multiplied before they are aggregated.

    Raises:
        SettingError: a number is out of range.
    """

    buffer_size: int
    concurrency: int
    staleness_weight: StalenessWeight = unweighted

    def __post_init__(self) -> None:
        size, at_work = self.buffer_size, self.concurrency
        require(is_count(size), "buffer_size", size, "a whole number >= 1", "buffer_size=10")
        require(is_count(at_work), "concurrency", at_work, "a whole number >= 1", "concurrency=20")

    def validate(self, num_clients: int) -> None:
        """Refuse a buffer that so many clients do not fill.

        Raises:
            SettingError: it is larger than the population.
        """
        name, expected = "strategy.buffer_size", f"at most {num_clients}, the number of clients"
        require(self.buffer_size <= num_clients, name, self.buffer_size, expected, f"{name}={num_clients}")


def polynomial(exponent: float = 0.5) -> StalenessWeight:
    """Return the weight ``s(tau) = (1 + tau)^-a`` (Xie et al.; with a = 1/2 that of Nguyen et al.).

    >>> polynomial(0.5)(np.array([0, 3])).tolist()
    [1.0, 0.5]
    """
    require(is_number(exponent, at_least=0), "exponent", exponent, "a number >= 0", "exponent=0.5")
    return lambda staleness_K: (1.0 + staleness_K) ** -float(exponent)


def hinge(slope: float = 10.0, grace: float = 4.0) -> StalenessWeight:
    """Return the weight ``s(tau) = 1 if tau <= b else 1 / (a (tau - b) + 1)`` (Xie et al.).

    >>> hinge(10, 4)(np.array([4, 5])).tolist()
    [1.0, 0.09090909090909091]
    """
    for name, value in (("slope", slope), ("grace", grace)):
        require(is_number(value, at_least=0), name, value, "a number >= 0", f"{name}=4")
    return lambda staleness_K: 1.0 / (slope * np.maximum(staleness_K - grace, 0.0) + 1.0)


def staleness_weight(kind: str, *, exponent: float = 0.5, slope: float = 10.0, grace: float = 4.0) -> StalenessWeight:
    """Return a weight by name: ``constant``, ``polynomial`` or ``hinge``.

    Raises:
        SettingError: there is no such weight, or a number is out of range.
    """
    weights = {"constant": unweighted, "polynomial": polynomial(exponent), "hinge": hinge(slope, grace)}
    require(kind in weights, "staleness", kind, f"one of {', '.join(weights)}", "staleness=polynomial")
    return weights[kind]
