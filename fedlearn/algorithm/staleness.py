"""Settings of asynchronous strategies: buffer size, concurrency, and the weight of an update by its staleness.

Shapes: K updates in a buffer.

The staleness of an update is the number of server steps since the client received its model. It is 0 if the server took
no step in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedlearn.errors import is_count, is_number, require

StalenessWeight = Callable[[np.ndarray], np.ndarray]  # staleness_K -> weight_K


def unweighted(staleness_K: np.ndarray) -> np.ndarray:
    """Return the weight ``s(tau) = 1`` of each update."""
    return np.ones(len(staleness_K))


@dataclass(frozen=True, kw_only=True)
class Asynchrony:
    """Set the buffer and the concurrency of a server that steps as soon as its buffer is full.

    After each completion the server sends the newest model to another client. No client gets the same model twice.

    Args:
        buffer_size: number of updates per server step, >= 1.
        concurrency: number of in-flight requests, >= 1; at most the number of clients.
        staleness_weight: factor ``s(tau_K)`` of each update before the aggregation.

    Raises:
        SettingError: a number is out of range.
    """

    buffer_size: int
    concurrency: int
    staleness_weight: StalenessWeight = unweighted

    def __post_init__(self) -> None:
        size, concurrency = self.buffer_size, self.concurrency
        require(is_count(size), "buffer_size", size, "a whole number >= 1", "buffer_size=10")
        require(is_count(concurrency), "concurrency", concurrency, "a whole number >= 1", "concurrency=20")

    def validate(self, num_clients: int) -> None:
        """Refuse a buffer that is larger than the population.

        Raises:
            SettingError: ``buffer_size`` is above the number of clients.
        """
        name, expected = "strategy.buffer_size", f"at most {num_clients}, the number of clients"
        require(self.buffer_size <= num_clients, name, self.buffer_size, expected, f"{name}={num_clients}")


def polynomial(exponent: float = 0.5) -> StalenessWeight:
    """Return the weight ``s(tau) = (1 + tau)^-a`` (Xie et al.; Nguyen et al. with a = 1/2).

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
        SettingError: the name is unknown, or a number is out of range.
    """
    weights = {"constant": unweighted, "polynomial": polynomial(exponent), "hinge": hinge(slope, grace)}
    require(kind in weights, "staleness", kind, f"one of {', '.join(weights)}", "staleness=polynomial")
    return weights[kind]
