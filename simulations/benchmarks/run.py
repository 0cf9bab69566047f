"""``python -m simulations.benchmarks.run``: measure the phases of whole runs, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fedlearn.callbacks.tables import print_table
from fedlearn.core.command_line import DONE, FAILED, UsageError, command_parser, run_command
from fedlearn.errors import did_you_mean
from fedlearn.runner.compose import CONF_DIR
from simulations.benchmarks.phases import PHASES
from simulations.benchmarks.run_child import WORKLOADS

FRAMEWORKS = ("torch", "jax")
SCENARIOS = ("heart", "digits")
DESCRIPTION = """\
Measure whole runs: seconds in imports, build, compilation, training, predictions, metrics, aggregation, callbacks,
checkpoints and report. A phase inside another phase counts as the inner phase only. The phases add up to the total.
Each run has its own process, with the default settings.

  python -m simulations.benchmarks.run
  python -m simulations.benchmarks.run digits w1 jax rounds=10 --repeats 9
"""


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """Measurements of one run of one scenario.

    Attributes:
        scenario: name of the scenario or workload.
        framework: ``torch`` or ``jax``.
        wall: wall time of each phase, seconds.
        processor: processor time of each phase, seconds, child processes included.
        first_round: wall time and processor time from the start of the process to the end of the first round.
        import_framework: wall time and processor time of ``python -c "import torch"`` or ``jax``.
        round_seconds: median duration of a round after the first, from the records of the run.
    """

    scenario: str
    framework: str
    wall: dict[str, float]
    processor: dict[str, float]
    first_round: tuple[float, float]
    import_framework: tuple[float, float]
    round_seconds: float

    @property
    def to_first_round(self) -> tuple[float, float]:
        """Time to the first round, divided by the time of the import of the framework: wall and processor."""
        wall, processor = (a / b for a, b in zip(self.first_round, self.import_framework, strict=True))
        return wall, processor


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    parser = command_parser("simulations.benchmarks.run", DESCRIPTION)
    words = "scenarios or workloads, frameworks, and settings of the runs; default heart digits torch jax"
    parser.add_argument("settings", nargs="*", metavar="word", help=words)
    parser.add_argument("--repeats", type=int, default=1, help="repeats, which take turns; prints medians (default 1)")
    return run_command(parser, measure, argv)


def measure(*, settings: Sequence[str], repeats: int) -> int:
    """Measure the runs and print their phases. Return the exit code."""
    scenarios, frameworks, overrides = parse_arguments(settings)
    runs: dict[tuple[str, str], list[WholeRun]] = {}
    for _ in range(max(1, repeats)):
        for pair in ((scenario, framework) for scenario in scenarios for framework in frameworks):
            run = run_once(*pair, overrides)
            if run is None:
                return FAILED
            runs.setdefault(pair, []).append(run)
    print_table([("scenario", "framework", "seconds", "total", *PHASES, "per round"), *_rows(runs)], num_text_columns=3)
    for (scenario, framework), repeated in runs.items():
        wall, processor = (median(run.to_first_round[i] for run in repeated) for i in (0, 1))
        seconds = median(run.first_round[1] for run in repeated)
        sys.stdout.write(
            f"{scenario} {framework}: {seconds:.2f} s of processor time to the first round; divided by the time of "
            f"python -c 'import {framework}': {wall:.2f} (wall), {processor:.2f} (processor)\n"
        )
    return DONE


def parse_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the scenarios, the frameworks and the settings of the command line.

    Raises:
        UsageError: an argument is none of them.

    >>> parse_arguments(["digits", "jax", "rounds=3"])
    (['digits'], ['jax'], ['rounds=3'])
    """
    known = [*(path.stem for path in sorted((CONF_DIR / "scenario").glob("*.yaml"))), *WORKLOADS]
    overrides = [word for word in arguments if "=" in word]
    names = [word for word in arguments if "=" not in word]
    for name in names:
        if name not in (*known, *FRAMEWORKS):
            near = did_you_mean(name, (*known, *FRAMEWORKS)) or SCENARIOS[0]
            expected = f"a scenario, {', '.join(WORKLOADS)}, {' or '.join(FRAMEWORKS)}, or setting=value"
            raise UsageError(f"{name} is not expected\n  expected  {expected}\n  try       {near}")
    scenarios = [name for name in names if name in known] or [*SCENARIOS]
    return scenarios, [name for name in names if name in FRAMEWORKS] or [*FRAMEWORKS], overrides


def run_once(scenario: str, framework: str, settings: Sequence[str]) -> WholeRun | None:
    """Run a scenario in a new process. Print the error of a failed run, and return None."""
    imported = _time([sys.executable, "-c", f"import {framework}"])
    began = time.time()
    task = {"scenario": scenario, "framework": framework, "settings": [*settings], "began": began}
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "simulations.benchmarks.run_child", json.dumps(task)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment())
        assert process.stdout is not None
        printed = process.stdout.read()
        wall, processor = _ended(process, began)
        result: dict[str, Any] = json.loads(printed) if printed else {"code": FAILED}
        if result["code"] or process.returncode:
            log.seek(0)
            sys.stderr.write(f"{scenario} {framework} failed\n{log.read()[-2000:]}")
            return None
    rounds = result["seconds"]
    return WholeRun(
        scenario=scenario,
        framework=framework,
        wall=_with_rest(result["wall"], wall),
        processor=_with_rest(result["processor"], processor),
        first_round=(result["first_round"][0], result["first_round"][1]),
        import_framework=imported,
        round_seconds=median(rounds[1:] or rounds),
    )


def environment() -> dict[str, str]:
    """Return the environment variables of a run: no telemetry, and no stored programs of JAX."""
    return {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "JAX_ENABLE_COMPILATION_CACHE": "false"}


def _time(command: list[str]) -> tuple[float, float]:
    """Run a command. Return its wall time and its processor time, seconds."""
    began = time.time()
    return _ended(subprocess.Popen(command, env=environment()), began)


def _ended(process: subprocess.Popen[Any], began: float) -> tuple[float, float]:
    """Wait for the end of a process. Return its wall time and its processor time, children included, seconds."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return time.time() - began, usage.ru_utime + usage.ru_stime


def _with_rest(phases: dict[str, float], total: float) -> dict[str, float]:
    """Return the phases with the end of the process, which it cannot measure itself, in the phase ``other``."""
    return {**phases, "other": phases["other"] + max(0.0, total - sum(phases.values()))}


def _rows(runs: dict[tuple[str, str], list[WholeRun]]) -> Iterator[tuple[str, ...]]:
    """Yield a row of wall times and a row of processor times for each scenario and framework."""
    for pair, repeated in runs.items():
        per_round = median(run.round_seconds for run in repeated)
        for kind, last in (("wall", f"{per_round:.4f}"), ("processor", "")):
            phases = {name: median(getattr(run, kind)[name] for run in repeated) for name in PHASES}
            total = median(sum(getattr(run, kind).values()) for run in repeated)
            yield (*pair, kind, f"{total:.2f}", *(f"{phases[name]:.3f}" for name in PHASES), last)


if __name__ == "__main__":
    sys.exit(main())
