"""``python -m simulations.benchmarks.mean``: memory and time of a mean over many updates that arrive one by one."""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Sequence

import numpy as np

from fedlearn import Layout
from fedlearn.algorithm.aggregation import mean
from fedlearn.core.records import Updates
from fedlearn.errors import FedlearnError, require

SIZES = {"clients": 100, "parameters": 25_000_000}
HELP = "python -m simulations.benchmarks.mean [clients=100] [parameters=25000000]\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code is 0 done, 2 bad setting."""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h", "help"} & set(argv):
        sys.stdout.write(HELP)
        return 0
    try:
        sizes = SIZES | dict(_pair(word) for word in argv)
    except FedlearnError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    vectors, seconds = measure(sizes["clients"], sizes["parameters"])
    sys.stdout.write(
        f"mean over {sizes['clients']:,} clients of {sizes['parameters']:,} parameters: {seconds:.2f} s of adding, "
        f"peak {vectors:.2f} float32 vectors besides the one that arrives\n"
    )
    return 0


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


def _pair(word: str) -> tuple[str, int]:
    key, _, value = word.partition("=")
    require(key in SIZES, key, value or "given", f"one of {', '.join(SIZES)}", "clients=100")
    require(value.isdecimal() and int(value) >= 1, key, value, "a whole number >= 1", f"{key}={SIZES[key]}")
    return key, int(value)


if __name__ == "__main__":
    sys.exit(main())
