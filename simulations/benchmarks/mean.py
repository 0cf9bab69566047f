"""``python -m simulations.benchmarks.mean``: memory and time of a mean over many updates that arrive one by one."""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Sequence

import numpy as np

from fedlearn import Layout
from fedlearn.algorithm.aggregation import mean
from fedlearn.core.command_line import DONE, command_parser, read_settings, run_command
from fedlearn.core.records import Updates
from fedlearn.errors import require

SIZES = {"clients": 100, "parameters": 25_000_000}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 done, 2 bad setting."""
    parser = command_parser("simulations.benchmarks.mean", "Measure the time and the memory of a streamed mean.")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="clients=100 parameters=25000000")
    return run_command(parser, print_costs, argv)


def print_costs(settings: Sequence[str]) -> int:
    """Measure and print; return the exit code."""
    sizes = SIZES | read_settings(settings, SIZES)
    for name, size in sizes.items():
        require(size >= 1, name, size, "a whole number >= 1", f"{name}={SIZES[name]}")
    vectors, seconds = measure(sizes["clients"], sizes["parameters"])
    sys.stdout.write(
        f"mean over {sizes['clients']:,} clients of {sizes['parameters']:,} parameters: {seconds:.2f} s of adding, "
        f"peak {vectors:.2f} float32 vectors besides the one that arrives\n"
    )
    return DONE


def measure(num_clients: int, num_parameters: int) -> tuple[float, float]:
    """The peak of what the fold allocates, in float32 vectors, and its seconds; arriving updates do not count."""
    aggregate, layout = mean(), Layout.from_shapes([("weight", (num_parameters,))])
    arriving_KD = np.full((1, num_parameters), 0.5, np.float32)
    tracemalloc.start()  # after the update, so that it is not counted
    began, fold = time.perf_counter(), aggregate.init(layout)
    for client in range(num_clients):
        one = np.array([client])
        fold = aggregate.add(
            fold, Updates(clients_K=one, delta_KD=arriving_KD, num_examples_K=one + 1, num_steps_K=one)
        )
    update_D = aggregate.finalize(fold)
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if not (update_D == 0.5).all():
        raise RuntimeError("a mean of equal updates must equal them")
    return peak / (4 * num_parameters), seconds


if __name__ == "__main__":
    sys.exit(main())
