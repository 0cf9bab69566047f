"""``python -m simulations.benchmarks.mean``: measure memory and time of a mean over updates that arrive one by one."""

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
    """Run the command. Return 0, or 2 for a wrong setting."""
    parser = command_parser("simulations.benchmarks.mean", "Measure time and memory of a streamed mean.")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="clients=100 parameters=25000000")
    return run_command(parser, print_costs, argv)


def print_costs(settings: Sequence[str]) -> int:
    """Measure and print time and memory, and return the exit code."""
    sizes = SIZES | read_settings(settings, SIZES)
    for name, size in sizes.items():
        require(size >= 1, name, size, "a whole number >= 1", f"{name}={SIZES[name]}")
    vectors, seconds = measure(sizes["clients"], sizes["parameters"])
    sys.stdout.write(
        f"mean over {sizes['clients']:,} clients of {sizes['parameters']:,} parameters: {seconds:.2f} s, "
        f"peak memory {vectors:.2f} float32 vectors besides the arriving update\n"
    )
    return DONE


def measure(num_clients: int, num_parameters: int) -> tuple[float, float]:
    """Aggregate updates one by one.

    Returns:
        Peak memory of the partial aggregate and duration in seconds. The unit of memory is one float32 vector of the
        model. The arriving update is not counted.
    """
    aggregate, layout = mean(), Layout.from_shapes([("weight", (num_parameters,))])
    arriving_KD = np.full((1, num_parameters), 0.5, np.float32)
    tracemalloc.start()  # after the update is allocated, so that it is not counted
    began, partial = time.perf_counter(), aggregate.init(layout)
    for client in range(num_clients):
        client_K = np.array([client])
        partial = aggregate.add(
            partial,
            Updates(clients_K=client_K, delta_KD=arriving_KD, num_examples_K=client_K + 1, num_steps_K=client_K),
        )
    update_D = aggregate.finalize(partial)
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if not (update_D == 0.5).all():
        raise RuntimeError("the mean of equal updates differs from the updates")
    return peak / (4 * num_parameters), seconds


if __name__ == "__main__":
    sys.exit(main())
