"""Run the systems in turn, each run in its own process, and collect their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import IO, Any

from simulations.benchmarks.settings import Settings

GRACE = 20.0  # seconds between SIGTERM and SIGKILL to a process group
# The first round must compile, so there is no compilation cache. Each system sets its own number of devices.
UNSET = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Measurements of one system in one repeat.

    Attributes:
        framework: ``torch`` or ``jax``.
        system: name of the system.
        repeat: number of the repeat, >= 1.
        variant: description of its method, processes and threads.
        seconds: duration of each round, seconds; the first one includes compilation and the start of workers.
        examples: number of training examples of each round.
        processor: processor time of each round, seconds, all descendant processes included.
        seconds_to_first_round: time from the start of the process to the end of the first round, with imports.
        memory_mib: peak resident memory of the process, MiB.
        child_memory_mib: peak resident memory of its largest child, MiB; shared memory counts in both.
        loss: mean loss on a thousand examples after the last round.
        load: Unix load average of the minute before the run, caused by other work or by the previous run.
        error: reason of the failure; empty for a successful run.
    """

    framework: str
    system: str
    repeat: int
    variant: str = ""
    seconds: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    seconds_to_first_round: float = 0.0
    memory_mib: float = 0.0
    child_memory_mib: float = 0.0
    loss: float = 0.0
    load: float = 0.0
    error: str = ""

    @property
    def seconds_per_round(self) -> float:
        """Median duration of a round, seconds. The first round counts only if it is the only one."""
        return median(self.seconds[1:] or self.seconds)

    @property
    def processor_per_round(self) -> float:
        """Mean processor time of a round, seconds. The first round counts only if it is the only one."""
        return fmean(self.processor[1:] or self.processor)

    @property
    def examples_per_second(self) -> float:
        """Training examples per second, over the same rounds as ``seconds_per_round``."""
        rounds = slice(1, None) if len(self.seconds) > 1 else slice(None)
        return sum(self.examples[rounds]) / sum(self.seconds[rounds])

    def as_json(self) -> dict[str, Any]:
        """Return all attributes as a dictionary."""
        return asdict(self)


def run_all(settings: Settings) -> Iterator[Run]:
    """Run each system ``repeats`` times, in turn, and yield each result.

    Every second repeat runs in reverse order, so that a drift of the machine favours no system.
    """
    pairs = [(framework, system) for framework in settings.frameworks for system in settings.systems]
    for repeat in range(1, settings.repeats + 1):
        for framework, system in pairs if repeat % 2 else reversed(pairs):
            yield run_system(settings, framework, system, repeat=repeat)


def run_system(settings: Settings, framework: str, system: str, *, repeat: int) -> Run:
    """Run one system in a new process. A failure is described in ``error``."""
    sizes = {**settings.sizes, "rounds": settings.rounds(system)}
    work = {"name": settings.workload.name, "device": settings.workload.device, **sizes}
    task = {"system": system, "framework": framework, "workload": work}
    load = os.getloadavg()[0]
    result = _run_child(
        task, limit=settings.limit, environment=environment(framework, system, settings.workload.device)
    )
    return Run(framework=framework, system=system, repeat=repeat, load=load, **result)


def environment(framework: str, system: str, device: str = "cpu") -> dict[str, str]:
    """Return the environment variables of a system's process.

    Torch has one thread per process. JAX chooses its number of threads. In Flower, JAX has one thread too, because each
    core has its own actor. Only a run of ours on another device sees devices other than the CPU.
    """
    variables = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    if device == "cpu" or system != "ours":
        variables |= {"JAX_PLATFORMS": "cpu"}
    if framework == "torch":
        variables |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    elif system == "flower":
        variables |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    return {name: value for name, value in os.environ.items() if name not in UNSET} | variables


def _run_child(task: dict[str, Any], *, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "simulations.benchmarks.child", json.dumps({**task, "began": time.time()})]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {limit:.0f} s (limit={limit:.0f})"}
        finally:
            _stop(process)
        return _read_outcome(printed, log, process.returncode)


def _read_outcome(printed: str, log: IO[str], code: int) -> dict[str, Any]:
    with suppress(json.JSONDecodeError):
        outcome: dict[str, Any] = json.loads(printed)
        return outcome
    log.seek(0)
    last_line = [line.strip() for line in log if line.strip()][-1:]
    return {"error": f"ended with exit code {code}: {''.join(last_line)[:200]}"}


def _stop(process: subprocess.Popen[str]) -> None:
    """Stop the process group of a run, including processes that are still running."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE)
            return
