"""What one program, in one process, is timed with, and what it says of itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from simulations.benchmarks.workloads import Workload


@dataclass
class Clock:
    """Times rounds.

    Attributes:
        seconds: of each round that has ended; the first holds what was compiled or started for it.
        examples: that were trained on in each.
        first: Unix time at the end of the first round.
    """

    seconds: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    first: float = 0.0
    _since: float = 0.0

    def start(self) -> None:
        """The first round begins."""
        self._since = time.perf_counter()

    def lap(self, num_examples: int) -> None:
        """A round has ended, the next begins."""
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self.examples.append(num_examples)
        self._since, self.first = now, self.first or time.time()


@dataclass(frozen=True)
class Done:
    """What a program leaves behind.

    Attributes:
        variant: how it went about it, with its processes and threads.
        params_D: the model after the last round, in the order of the torch twin's layout.
    """

    variant: str
    params_D: np.ndarray


class System(Protocol):
    """A module with a ``run`` for every system that is compared."""

    run: Callable[[Workload, str, Clock], Done]  # (workload, framework, clock)
