"""Run the systems in turn, each in a process of its own, and read what they say."""

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
from statistics import median
from typing import IO, Any

from simulations.benchmarks.settings import Settings

GRACE = 20.0  # seconds from asking a process group to end to ending it
UNSET = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")  # a first round compiles, and every system sets its own devices


@dataclass(frozen=True, kw_only=True)
class Run:
    """One system in one repeat.

    Attributes:
        framework, system, repeat: which; repeats count from 1.
        variant: how the system went about it, with its processes and threads.
        seconds: of each round, the first with what is compiled or started for it.
        examples: trained on in each round.
        seconds_to_first_round: from the start of the process to the end of the first round, imports included.
        memory_mib: peak resident memory of the process.
        child_memory_mib: of the largest of its children; memory that they share counts in both.
        loss: on a thousand examples after the last round.
        load: processes that wanted a core in the minute before (Unix load average): others' work, or the last run's.
        error: why there are no numbers, if there are none.
    """

    framework: str
    system: str
    repeat: int
    variant: str = ""
    seconds: list[float] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    seconds_to_first_round: float = 0.0
    memory_mib: float = 0.0
    child_memory_mib: float = 0.0
    loss: float = 0.0
    load: float = 0.0
    error: str = ""

    @property
    def seconds_per_round(self) -> float:
        """The median, without the first round where there are others."""
        return median(self.seconds[1:] or self.seconds)

    @property
    def examples_per_second(self) -> float:
        """Over the same rounds, all together."""
        own = slice(1, None) if len(self.seconds) > 1 else slice(None)
        return sum(self.examples[own]) / sum(self.seconds[own])

    def as_json(self) -> dict[str, Any]:
        """All attributes."""
        return asdict(self)


def run_all(settings: Settings) -> Iterator[Run]:
    """Every system, ``repeats`` times, in turn; every other repeat backwards, so that drift favours none."""
    pairs = [(framework, system) for framework in settings.frameworks for system in settings.systems]
    for repeat in range(1, settings.repeats + 1):
        for framework, system in pairs if repeat % 2 else reversed(pairs):
            yield run_system(settings, framework, system, repeat=repeat)


def run_system(settings: Settings, framework: str, system: str, *, repeat: int) -> Run:
    """One system in a fresh process; what goes wrong is told in ``error``."""
    sizes = {**settings.sizes, "rounds": settings.rounds(system)}
    task = {"system": system, "framework": framework, "workload": {"name": settings.workload.name, **sizes}}
    load = os.getloadavg()[0]
    result = _child(task, limit=settings.limit, environment=environment(framework, system))
    return Run(framework=framework, system=system, repeat=repeat, load=load, **result)


def environment(framework: str, system: str) -> dict[str, str]:
    """What the process is told before it starts: torch has one thread a process, JAX what it chooses.

    JAX in Flower's actors has one thread as well, since there is an actor for each core.
    """
    mine = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "JAX_PLATFORMS": "cpu"}
    if framework == "torch":
        mine |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    elif system == "flower":
        mine |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    return {name: value for name, value in os.environ.items() if name not in UNSET} | mine


def _child(task: dict[str, Any], *, limit: float, environment: dict[str, str]) -> dict[str, Any]:
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
            _end(process)
        return _answer(printed, log, process.returncode)


def _answer(printed: str, log: IO[str], code: int) -> dict[str, Any]:
    with suppress(json.JSONDecodeError):
        answer: dict[str, Any] = json.loads(printed)
        return answer
    log.seek(0)
    last = [line.strip() for line in log if line.strip()][-1:]
    return {"error": f"ended with exit code {code}: {''.join(last)[:200]}"}


def _end(process: subprocess.Popen[str]) -> None:
    """End the process group that was started for one run, with what it left running."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE)
            return
