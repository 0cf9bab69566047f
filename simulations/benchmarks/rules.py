"""``python -m simulations.benchmarks.rules``: measure the processor time of robust rules on updates of a large model.

Shapes: K clients, D parameters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import strategies
from fedlearn import Strategy, Updates
from fedlearn.algorithm import aggregate_updates
from fedlearn.core.command_line import DONE, command_parser, run_command

RULES: Mapping[str, Callable[..., Strategy]] = {
    "fedavg": strategies.fedavg,
    "norm_bounding": strategies.norm_bounding,
    "fedmedian": strategies.fedmedian,
    "fedtrimmedavg": strategies.fedtrimmedavg,
    "rfa": strategies.rfa,
    "centered_clipping": strategies.centered_clipping,
    "fltrust": strategies.fltrust,
    "krum": strategies.krum,
    "bulyan": strategies.bulyan,
    "nnm (+ fedtrimmedavg)": strategies.nnm,
    "bucketing (+ rfa)": strategies.bucketing,
}


def seconds(strategy: Strategy, updates: Updates) -> float:
    """Return the processor time of the aggregation of one block of updates, seconds of all threads together."""
    began = time.process_time()
    aggregate_updates(strategy.aggregate, updates)
    return time.process_time() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    parser = command_parser(
        "simulations.benchmarks.rules", "Measure the processor time of robust rules on large updates."
    )
    parser.add_argument("--updates", type=int, default=100, help="number of updates (default 100)")
    parser.add_argument("--parameters", type=int, default=1_000_000, help="number of parameters (default 1,000,000)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements per rule; prints the shortest (default 3)")
    return run_command(parser, print_table, argv)


def print_table(*, updates: int, parameters: int, repeat: int) -> int:
    """Print each rule with its shortest measurement, seconds, and return the exit code."""
    rng, ones = np.random.default_rng(0), np.ones(updates, np.int64)
    rows_KD = rng.standard_normal((updates, parameters), dtype=np.float32)
    block = Updates(clients_K=np.arange(updates), delta_KD=rows_KD, num_examples_K=ones, num_steps_K=ones)
    sys.stdout.write(f"{updates} updates of {parameters:,} parameters\n")
    for name, build in RULES.items():
        least = min(seconds(build(), block) for _ in range(repeat))
        sys.stdout.write(f"  {name:<24} {least:8.2f} s\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
