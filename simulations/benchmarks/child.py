"""Run one system on one workload, print one line of JSON, and exit.

`simulations.benchmarks.measure` starts this program. Its only argument is the task as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from importlib import import_module
from typing import Any

from fedlearn.errors import FedlearnError
from simulations.benchmarks.clock import Clock, Done, System
from simulations.benchmarks.workloads import Workload, workload

PACKAGES = {  # missing module: package to install
    "torch": "fedlearn[torch]",
    "jax": "fedlearn[jax]",
    "flax": "fedlearn[jax]",
    "optax": "fedlearn[jax]",
    "flwr": "flwr[simulation]",
    "ray": "flwr[simulation]",
}


def main(argv: list[str]) -> int:
    """Run the task and print its outcome. All other output of this process goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    out.write(json.dumps(outcome(json.loads(argv[0]))) + "\n")
    out.flush()
    return 0


def outcome(task: dict[str, Any]) -> dict[str, Any]:
    """Run a task and return its measurements, or the reason of its failure under ``error``.

    Args:
        task: ``system``, ``framework``, ``began`` (Unix time of the start of the process, seconds) and ``workload``,
            the arguments of `simulations.benchmarks.workloads.workload`.
    """
    clock = Clock()
    try:
        work = workload(**task["workload"])
        done = system(task["system"], task["framework"]).run(work, task["framework"], clock)
        memory = {"memory_mib": _peak(resource.RUSAGE_SELF), "child_memory_mib": _peak(resource.RUSAGE_CHILDREN)}
        loss = loss_of(work, task["framework"], done)
    except ModuleNotFoundError as missing:
        return {"error": _how_to_install(missing)}
    except FedlearnError as error:
        return {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "variant": done.variant,
        "seconds": clock.seconds,
        "examples": clock.examples,
        "processor": clock.processor,
        "seconds_to_first_round": clock.first - task["began"],
        "loss": loss,
        **memory,
    }


def system(name: str, framework: str) -> System:
    """Import the module of a system.

    Raises:
        FedlearnError: The system does not support the framework.
    """
    if name == "pfl" and framework != "torch":
        raise FedlearnError(
            "systems=pfl with framework=jax: pfl-research has no JAX model\n  expected  framework=torch\n"
            "  try       framework=torch"
        )
    module: Any = import_module(f"simulations.benchmarks.{'pfl_torch' if name == 'pfl' else name}")
    return module


def loss_of(work: Workload, framework: str, done: Done) -> float:
    """Return the mean loss on a thousand examples after the last round. It shows that training took place."""
    import numpy as np

    from fedlearn.core.metrics import evaluate
    from fedlearn.core.records import Predictions
    from simulations.benchmarks.ours import trainer
    from simulations.benchmarks.synthetic import pool_of

    x, y = pool_of(work).x[:1000], pool_of(work).y[:1000]
    outputs = trainer(work, framework).predict(np.asarray(done.params_D), x)
    return float(evaluate([Predictions(client=0, outputs=outputs, targets=y)], task=work.task).pooled["loss"])


def _how_to_install(missing: ModuleNotFoundError) -> str:
    name = (missing.name or "").split(".")[0]
    return f"{name} is not installed: pip install '{PACKAGES.get(name, name)}'"


def _peak(processes: int) -> float:
    """Return the peak resident memory, MiB, of this process or of its largest child that has ended."""
    return resource.getrusage(processes).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
