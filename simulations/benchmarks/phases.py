"""Divide the time of a run among its phases, without code in the run itself.

`watch` wraps functions of fedlearn in this process as soon as their modules are loaded. So ordinary runs have no
overhead. A phase inside another phase counts as the inner phase only, and the phases add up to the total.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import GeneratorType
from typing import Any

from simulations.benchmarks.processes import processor_seconds

PHASES = (
    "imports",
    "build",
    "compile",
    "training",
    "predict",
    "metrics",
    "aggregation",
    "callbacks",
    "checkpoints",
    "report",
    "other",
)
FUNCTIONS = {  # function: phase
    "fedlearn.runner.start:_run_command": "build",
    "fedlearn.runner.start:run_rounds": "other",
    "fedlearn.engines.base:InProcessEngine.fit": "training",
    "fedlearn.engines.base:InProcessEngine.fit_mixed_rounds": "training",
    "fedlearn.engines.base:InProcessEngine.evaluate": "predict",
    "fedlearn.trainers.torch.trainer:TorchTrainer.predict": "predict",
    "fedlearn.trainers.jax.trainer:JaxTrainer.predict": "predict",
    "fedlearn.core.metrics:evaluate": "metrics",
    "fedlearn.core.metrics:combine_evaluations": "metrics",
    "fedlearn.runner.rounds:write_evaluation": "metrics",
    "fedlearn.loop.training_loop:accumulate": "aggregation",
    "fedlearn.loop.training_loop:accumulate_buffer": "aggregation",
    "fedlearn.loop.training_loop:_finish_round": "aggregation",
    "fedlearn.callbacks.callback_list:CallbackList.on_start": "callbacks",
    "fedlearn.callbacks.callback_list:CallbackList.on_round": "callbacks",
    "fedlearn.callbacks.callback_list:CallbackList.on_end": "callbacks",
    "fedlearn.callbacks.callback_list:CallbackList.close": "callbacks",
    "fedlearn.callbacks.checkpoints:Checkpoints.on_round": "checkpoints",
    "fedlearn.callbacks.checkpoints:Checkpoints.on_end": "checkpoints",
    "fedlearn.callbacks.checkpoints:Checkpoints.close": "checkpoints",
    "fedlearn.callbacks.report:Report.on_end": "report",
}
END_OF_ROUND = "fedlearn.callbacks.callback_list:CallbackList.on_round"
COMPILATION = "/jax/core/compile/"  # start of the names of JAX's events


class PhaseClock:
    """Measure wall time and processor time of each phase, seconds.

    Args:
        began: Unix time of the start of the process, seconds.

    Attributes:
        wall: wall time of each phase.
        processor: processor time of each phase, child processes included.
        first_round: wall and processor time from the start of the process to the end of the first round.
    """

    def __init__(self, began: float) -> None:
        self.wall, self.processor = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self.first_round: tuple[float, float] | None = None
        self._stack = ["imports"]
        self._began = self._last_wall = time.perf_counter() - (time.time() - began)
        self._last_processor = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the body for a phase, except for the time of phases inside it."""
        self.lap()
        self._stack.append(name)
        try:
            yield
        finally:
            self.lap()
            self._stack.pop()

    def switch(self, name: str) -> None:
        """Count the time outside all other phases for this phase from now on."""
        self.lap()
        self._stack[0] = name

    def lap(self) -> None:
        """Add the time since the last call to the current phase."""
        wall, processor = time.perf_counter(), processor_seconds()
        self.wall[self._stack[-1]] += wall - self._last_wall
        self.processor[self._stack[-1]] += processor - self._last_processor
        self._last_wall, self._last_processor = wall, processor

    def end_round(self) -> None:
        """Note the end of the first round."""
        if self.first_round is None:
            self.lap()
            self.first_round = self._last_wall - self._began, self._last_processor

    def start_compilation(self, event: str, start: float, **_: Any) -> None:
        """Enter the phase ``compile``. JAX calls this function before it traces or compiles a program."""
        if event.startswith(COMPILATION) and self._is_main():
            self.lap()
            self._stack.append("compile")

    def end_compilation(self, event: str, seconds: float, **_: Any) -> None:
        """Leave the phase ``compile``. JAX calls this function after it has traced or compiled a program."""
        if event.startswith(COMPILATION) and self._is_main() and self._stack[-1] == "compile":
            self.lap()
            self._stack.pop()

    @staticmethod
    def _is_main() -> bool:
        """Return whether this is the main thread. Other threads work beside it, so their time is in its phase."""
        return threading.current_thread() is threading.main_thread()


def watch(clock: PhaseClock) -> None:
    """Wrap imports, and the functions of `FUNCTIONS` when their modules are loaded."""
    waiting, load = dict(FUNCTIONS), builtins.__import__
    depth = 0

    def timed_import(name: str, *args: Any, **options: Any) -> Any:
        nonlocal depth
        if name in sys.modules and not (args[2:3] and args[2]):  # loaded, and no submodule may follow
            return load(name, *args, **options)
        depth += 1
        try:
            with clock.phase("imports"):
                return load(name, *args, **options)
        finally:
            depth -= 1
            if not depth:
                _wrap_loaded(clock, waiting)

    builtins.__import__ = timed_import
    import_module = importlib.import_module

    def timed_import_module(name: str, package: str | None = None) -> Any:
        nonlocal depth
        depth += 1
        try:
            with clock.phase("imports"):
                return import_module(name, package)
        finally:
            depth -= 1
            if not depth:
                _wrap_loaded(clock, waiting)

    importlib.import_module = timed_import_module


def _wrap_loaded(clock: PhaseClock, waiting: dict[str, str]) -> None:
    """Wrap the functions whose modules are loaded, and listen to the compilations of JAX."""
    for function in [name for name in waiting if name.partition(":")[0] in sys.modules]:
        phase = waiting.pop(function)
        module, _, path = function.partition(":")
        owner: Any = sys.modules[module]
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        ends_round = clock.end_round if function == END_OF_ROUND else None
        setattr(owner, name, _timed(clock, phase, getattr(owner, name), ends_round))
    if "jax.monitoring" in sys.modules and COMPILATION not in waiting:
        waiting[COMPILATION] = "compile"
        monitoring = sys.modules["jax.monitoring"]
        monitoring.register_scalar_listener(clock.start_compilation)
        monitoring.register_event_duration_secs_listener(clock.end_compilation)


def _timed(clock: PhaseClock, phase: str, function: Callable[..., Any], then: Callable[[], None] | None) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with clock.phase(phase):
            result = function(*args, **options)
        if then:
            then()
        return _each(clock, phase, result) if isinstance(result, GeneratorType) else result

    return call


def _each(clock: PhaseClock, phase: str, generator: Iterator[Any]) -> Iterator[Any]:
    """Yield the values of a generator. The computation of each value counts for the phase."""
    while True:
        with clock.phase(phase):
            try:
                value = next(generator)
            except StopIteration:
                return
        yield value
