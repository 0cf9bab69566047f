"""``python -m simulations.benchmarks.large``: measure a mean over large models against a plain loop on one core.

Shapes: K clients, D parameters.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

import strategies
from fedlearn import FederatedData, LocalSettings, Schedule, Strategy, federate, from_arrays, start, vector
from fedlearn.callbacks.checkpoints import Checkpoints
from fedlearn.callbacks.tables import print_table
from fedlearn.core.command_line import DONE, command_parser, run_command
from fedlearn.core.records import Round
from fedlearn.core.tasks import as_task
from fedlearn.loop.protocols import Engine
from fedlearn.runner.environment import set_environment

INPUTS, CLASSES, BATCH, STEPS = 1000, 1000, 20, 2
TICKS = 100  # ticks of processor time per second in /proc


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    about = "Measure rounds of a mean over large models, in turns with a plain loop of torch on one core."
    parser = command_parser("simulations.benchmarks.large", about)
    parser.add_argument("--framework", default="torch", choices=("torch", "jax"), help="framework (default torch)")
    parser.add_argument("--width", type=int, default=4096, help="hidden units: 4096 for 25 M parameters, 8950 for 98 M")
    parser.add_argument("--clients", type=int, default=8, help="clients per round (default 8)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of each (default 3)")
    parser.add_argument("--checkpoints", action="store_true", help="measure three rounds of FedAdam with checkpoints")
    return run_command(parser, measure, argv)


def measure(*, framework: str, width: int, clients: int, repeat: int, checkpoints: bool) -> int:
    """Print a row for each program, and return the exit code."""
    set_environment(framework)
    data = _data(clients)
    if not checkpoints:
        plain_loop = partial(import_module("simulations.benchmarks.large_torch").plain_loop, num_classes=CLASSES)
        return _compare({"fedlearn": _fedlearn(framework, width, data), "loop": plain_loop(width, data)}, repeat)
    with tempfile.TemporaryDirectory() as folder:
        saved = _checkpointed(framework, width, data, Path(folder))
        return _compare({"with checkpoints": saved, "without": _checkpointed(framework, width, data, None)}, repeat)


def _compare(programs: Mapping[str, Callable[[], object]], repeat: int) -> int:
    """Print a row for each program, and the ratio of the first to the second."""
    times: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in programs}
    for _ in range(repeat + 1):  # the first round starts processes and compiles programs
        for name, run in programs.items():
            times[name].append(_timed(run))
    rows = [[name, *_summary(taken[1:])] for name, taken in times.items()]
    walls = [median(wall for wall, _ in taken[1:]) for taken in times.values()]
    busiest = [median(max(seconds) for _, seconds in taken[1:]) for taken in times.values()]
    ratios = [f"{first / second:.2f}" for first, second in (walls, busiest)]
    header = ["program", "wall", "busiest process", "processor"]
    print_table([header, *rows, ["ratio", *ratios, ""]])
    return DONE


def _summary(taken: Sequence[tuple[float, list[float]]]) -> list[str]:
    wall = median(seconds for seconds, _ in taken)
    busiest, total = (median(of(seconds) for _, seconds in taken) for of in (max, sum))
    return [f"{wall:.2f} s", f"{busiest:.2f} s", f"{total:.2f} s"]


def _timed(run: Callable[[], object]) -> tuple[float, list[float]]:
    """Return the time of a call on the clock, and the processor time of this process and of its children."""
    before, begin = _processor_seconds(), time.perf_counter()
    run()
    wall, after = time.perf_counter() - begin, _processor_seconds()
    return wall, [seconds - before.get(process, 0.0) for process, seconds in after.items()]


def _processor_seconds() -> dict[str, float]:
    """Return the processor time of this process and of its children, by process id."""
    children = [line for file in Path("/proc/self/task").glob("*/children") for line in file.read_text().split()]
    seconds = {}
    for process in ("self", *children):
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        seconds[process] = (int(fields[11]) + int(fields[12])) / TICKS
    return seconds


def _data(num_clients: int) -> FederatedData:
    rng, num_examples = np.random.default_rng(0), num_clients * BATCH * STEPS
    x = rng.standard_normal((num_examples, INPUTS), dtype=np.float32)
    assignment = np.repeat(np.arange(num_clients), BATCH * STEPS)
    return from_arrays(x, rng.integers(0, CLASSES, num_examples), assignment=assignment, task="multiclass")


def _fedlearn(framework: str, width: int, data: FederatedData) -> Callable[[], object]:
    _, rounds = _rounds(framework, width, data, strategies.fedavg())
    return lambda: next(rounds)


def _rounds(framework: str, width: int, data: FederatedData, strategy: Strategy) -> tuple[Engine, Iterator[Round]]:
    trainer = import_module(f"simulations.benchmarks.large_{framework}").build_trainer(width, INPUTS, CLASSES)
    engine = vector(data, trainer)
    state = start(strategy, trainer.init(1), engine, seed=1)
    local = LocalSettings(batch_size=BATCH, steps=STEPS, learning_rate=0.01)
    return engine, federate(strategy, engine, state, schedule=Schedule(rounds=10**6), local=local)


def _checkpointed(framework: str, width: int, data: FederatedData, folder: Path | None) -> Callable[[], object]:
    """Return a function that runs three rounds of FedAdam and saves each of them; without a folder it saves none."""
    engine, rounds = _rounds(framework, width, data, strategies.fedadam())
    callback = Checkpoints()
    run: Any = SimpleNamespace(
        folder=folder,
        layout=engine.layout,
        client_states=dict,
        deployed=False,
        history=(),
        start_round=0,
        selection_metric="loss",
        task=as_task("multiclass"),
    )
    callback.on_start(run)

    def three_rounds() -> None:
        for round in islice(rounds, 3):
            if folder is not None:
                callback.on_round(round)
        callback.close()  # a thread writes the last checkpoint

    return three_rounds


if __name__ == "__main__":
    sys.exit(main())
