"""Run one simulation as a user does, print the time of its phases as one line of JSON, and exit.

`simulations.benchmarks.run` starts this program. Its only argument is the task as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from simulations.benchmarks.phases import PhaseClock, watch

WORKLOADS = ("w1", "w2", "w3", "w4", "w5")  # not imported, because the import of the workloads is a part of the run
NUM_HELD_OUT = 1000  # examples of a workload that evaluate the model


def main(argv: list[str]) -> int:
    """Run the task and print its measurements. All other output of this process goes to standard error."""
    task = json.loads(argv[0])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    clock = PhaseClock(task["began"])
    watch(clock)
    with tempfile.TemporaryDirectory() as folder:
        code = _run(task, folder, clock)
        seconds = _round_seconds(Path(folder, "run")) if not code else []
    clock.lap()
    result = {"code": code, "wall": clock.wall, "processor": clock.processor, "first_round": clock.first_round}
    out.write(json.dumps({**result, "seconds": seconds}) + "\n")
    out.flush()
    return 0


def _run(task: dict[str, Any], folder: str, clock: PhaseClock) -> int:
    settings = [f"framework={task['framework']}", f"hydra.run.dir={folder}/run", *task["settings"]]
    if task["scenario"] in WORKLOADS:
        return _run_workload(task, Path(folder, "run"), clock)
    from simulations.run import main as run

    clock.switch("other")
    return run([f"scenario={task['scenario']}", *settings])


def _run_workload(task: dict[str, Any], folder: Path, clock: PhaseClock) -> int:
    """Run a workload of `simulations.benchmarks.speed` with default callbacks and an evaluation in each round."""
    from dataclasses import replace

    import yaml  # type: ignore[import-untyped]

    import fedlearn
    from simulations.benchmarks.ours import trainer
    from simulations.benchmarks.synthetic import federated_data, pool_of
    from simulations.benchmarks.workloads import workload
    from strategies import fedavg

    clock.switch("build")
    work = workload(task["scenario"])
    pool = pool_of(work)
    held_out = fedlearn.Examples(pool.x[:NUM_HELD_OUT], pool.y[:NUM_HELD_OUT])
    data = replace(federated_data(work), pooled_test=lambda: held_out)
    scenario = fedlearn.Scenario(name=work.name, data=data, trainer=trainer(work, task["framework"]))
    typed = [setting.split("=", 1) for setting in task["settings"]]
    settings = {"rounds": work.rounds, "local": work.local, **{name: yaml.safe_load(value) for name, value in typed}}
    fedlearn.run(scenario, fedavg(clients_per_round=work.cohort_size), folder=folder, settings=settings)
    return 0


def _round_seconds(folder: Path) -> list[float]:
    """Return the duration of each round, from the records of the run."""
    from fedlearn.callbacks.run_history import METRICS_FILE

    return [json.loads(line)["seconds"] for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
