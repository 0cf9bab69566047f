"""Timing of rounds, and the result of one program in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from simulations.benchmarks.processes import tree_processor_seconds
from simulations.benchmarks.workloads import Workload


@dataclass
class Clock:
    """Measure the seconds of each round.

    Attributes:
        seconds: duration of each finished round, seconds; the first one includes compilation and the start of workers.
        examples: number of training examples of each finished round.
        processor: processor time of each finished round, seconds, all descendant processes included.
        first: Unix time at the end of the first round, seconds; 0 before.
    """

    seconds: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    first: float = 0.0
    _since: float = 0.0
    _processor_since: float = 0.0

    def start(self) -> None:
        """Note the start of the first round."""
        self._processor_since = tree_processor_seconds()
        self._since = time.perf_counter()

    def lap(self, num_examples: int) -> None:
        """Note the end of a round and the start of the next one."""
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self.examples.append(num_examples)
        self.first = self.first or time.time()
        before = time.process_time()
        processor = tree_processor_seconds()
        self.processor.append(processor - (time.process_time() - before) - self._processor_since)
        self._processor_since, self._since = processor, time.perf_counter()  # without the time of this measurement


@dataclass(frozen=True)
class Done:
    """Result of a program.

    Attributes:
        variant: description of its method, processes and threads.
        params_D: global model after the last round, (D,), in the layout of the torch model.
    """

    variant: str
    params_D: np.ndarray


class System(Protocol):
    """Protocol of the module of a system: it has a function ``run``."""

    run: Callable[[Workload, str, Clock], Done]  # (workload, framework, clock)
