"""``python -m simulations.benchmarks.adapters``: train adapters in joint passes and one client at a time.

A row has batches of some sentences with some tokens. Time is per client step. Memory is the size of the base with all
adapters, and the growth of the process in training, in percent of this size.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from statistics import median
from typing import Any

from fedlearn.callbacks.tables import print_table
from fedlearn.core.command_line import DONE, command_parser, run_command
from fedlearn.errors import require
from fedlearn.runner.environment import set_environment
from simulations.benchmarks.scale import Seconds, seconds

PROGRAMS = ("peft", "alone", "joint")  # a plain loop with peft; fedlearn one client at a time; fedlearn in joint passes
SHAPES = ("1x16", "1x64", "2x32", "4x16", "8x16", "8x32", "8x64")
HEADER = ["shape", "layers", *PROGRAMS, "peft / joint", "alone / joint", "difference", "memory"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    about = "Measure client steps on adapters of a BERT, in joint passes and one client at a time."
    parser = command_parser("simulations.benchmarks.adapters", about)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="sentences x tokens of a batch, e.g. 8x32")
    parser.add_argument("--varied", action="store_true", help="lengths from a quarter of the tokens to all of them")
    parser.add_argument("--width", type=int, default=512, help="features of the BERT (default 512: 41 M parameters)")
    parser.add_argument("--depth", type=int, default=8, help="layers of the BERT (default 8)")
    parser.add_argument("--tuned", type=int, default=8, help="last layers with adapters (default 8)")
    parser.add_argument("--clients", type=int, default=8, help="clients of a round (default 8)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a client in a round (default 4)")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"), help="default float32")
    parser.add_argument("--cores", type=int, default=1, help="threads of peft, processes of fedlearn (default 1)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of each program (default 3)")
    parser.add_argument("--memory", action="store_true", help="also measure memory, in a process of each program")
    return run_command(parser, measure, argv)


def measure(*, shapes: Sequence[str], repeat: int, memory: bool, **sizes: Any) -> int:
    """Print a row for each shape of a batch, and return the exit code."""
    for shape in shapes:
        is_shape = all(part.isdecimal() and int(part) for part in shape.split("x")) and shape.count("x") == 1
        require(is_shape, "--shapes", shape, "sentences x tokens", "--shapes 8x32")
    os.environ["OMP_NUM_THREADS"] = str(sizes["cores"])
    set_environment("torch", sizes["cores"])
    print_table([HEADER, *(_row(shape, sizes, repeat, memory) for shape in shapes)])
    return DONE


def _row(shape: str, sizes: Mapping[str, Any], repeat: int, memory: bool) -> list[str]:
    programs = _cohort(shape, sizes).programs
    times: dict[str, list[Seconds]] = {name: [] for name in PROGRAMS}
    for _ in range(repeat + 1):  # the first round prepares kernels and checks the model
        for name, run in programs.items():
            times[name].append(seconds(run))
    steps = sizes["clients"] * sizes["steps"]
    cost = {name: 1000 * median(_time(each, sizes) for each in taken[1:]) / steps for name, taken in times.items()}
    ratios = [f"{cost[name] / cost['joint']:.2f}" for name in ("peft", "alone")]
    difference = abs(programs["alone"]() - programs["joint"]()).max()
    parts = [f"{_memory(name, shape, sizes):.0f} %" for name in PROGRAMS] if memory else ["-"]
    shown = [f"{cost[name]:.1f} ms" for name in PROGRAMS]
    return [shape, f"{sizes['tuned']} of {sizes['depth']}", *shown, *ratios, f"{difference:.0e}", " / ".join(parts)]


def _time(taken: Seconds, sizes: Mapping[str, Any]) -> float:
    """Return the processor time of a single thread, or the time on the clock of several threads."""
    return taken.processor if sizes["cores"] == 1 else taken.wall


def _cohort(shape: str, sizes: Mapping[str, Any]) -> Any:
    batch, length = map(int, shape.split("x"))
    return import_module("simulations.benchmarks.adapters_torch").Cohort(batch=batch, length=length, **sizes)


def _memory(program: str, shape: str, sizes: Mapping[str, Any]) -> float:
    """Return the peak memory of a program in a new process, in percent of base and adapters."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, program, shape, dict(sizes)).result()


def _peak(program: str, shape: str, sizes: Mapping[str, Any]) -> float:
    set_environment("torch", sizes["cores"])
    cohort = _cohort(shape, sizes)
    before = _peak_bytes()
    for _ in range(2):
        cohort.programs[program]()
    return 100 * (1 + (_peak_bytes() - before) / cohort.num_bytes)


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
