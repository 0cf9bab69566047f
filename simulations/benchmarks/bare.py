"""Baseline of the comparison: the best hand-written program for each workload, without a framework.

Shapes: D parameters.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np

from fedlearn.core.layout import default_initial_parameters
from fedlearn.core.random import Purpose, generator
from simulations.benchmarks.clock import Clock, Done
from simulations.benchmarks.synthetic import Orders, cohort_of, shuffled
from simulations.benchmarks.workloads import SEED, Workload


def run(workload: Workload, framework: str, clock: Clock) -> Done:
    """Run federated averaging with a program that is written for this workload only."""
    program = import_module(f"simulations.benchmarks.bare_{framework}").Bare(workload)
    params_D = default_initial_parameters(program.layout, generator(SEED, Purpose.INIT))
    clock.start()
    for round in range(1, workload.rounds + 1):
        params_D, num_examples = run_round(program, workload, params_D, round=round)
        clock.lap(num_examples)
    program.close()
    return Done(program.variant, params_D)


def run_round(
    program: object,
    workload: Workload,
    params_D: np.ndarray,
    *,
    round: int,
    cohort_K: np.ndarray | None = None,
    orders: Orders = shuffled,
) -> tuple[np.ndarray, int]:
    """Run one round.

    Args:
        program: instance of ``Bare`` of a framework.
        workload: workload of the program.
        params_D: global model (D,), float32.
        round: number of the round, >= 1.
        cohort_K: client numbers; None draws the cohort of the round.
        orders: function that draws the order of examples for each client.

    Returns:
        The next global model (D,), and the number of examples of the cohort.
    """
    cohort_K = cohort_of(workload, round) if cohort_K is None else cohort_K
    share = list(zip(cohort_K.tolist(), orders(workload, round, cohort_K), strict=True))
    return program.fit(params_D, share), sum(len(order_N) for _, order_N in share)  # type: ignore[attr-defined]
