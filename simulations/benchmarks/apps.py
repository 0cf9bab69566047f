"""``python -m simulations.benchmarks.apps [num_nodes] [rounds] [repeats]``: one Flower app, without Ray and with it.

Both runtimes run the same app: our grid in one process (`fedlearn.flower.in_process_grid`), and Flower's simulation
with one actor per core. Clients train and evaluate at almost no cost, so the result is the cost of the runtime. The
runtimes take turns, and each run has its own process.

The table has medians over the runs. A whole run includes imports and the start of Ray. The time of a round excludes the
first round. The processor time of a round counts the process of the ServerApp. Other work on the machine does not
change it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np

from fedlearn.callbacks.tables import print_table
from simulations.benchmarks.processes import num_cores

SIZE = 481  # number of parameters, as in the model of scenario=heart
LONGEST = 600.0  # maximum duration of a run, seconds
RUNTIMES = ("ours", "flower")


def main(argv: list[str]) -> int:
    """Measure both runtimes and print a table. With ``--one``, run one of them and print the times of its rounds."""
    if argv[0:1] == ["--one"]:
        sys.stdout.write(json.dumps(ends_of(argv[1], int(argv[2]), int(argv[3]))))
        return 0
    num_nodes, rounds, repeats = (int(value) for value in (argv + ["100", "4", "3"][len(argv) :]))
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in RUNTIMES}
    for _ in range(repeats):
        for name in RUNTIMES:
            seconds[name].append(measured(name, num_nodes, rounds))
    ours, theirs = (np.median(seconds[name], axis=0) for name in RUNTIMES)
    names = ("whole run, s", "round, s", "processor time of a round, s")
    rows = [(f"{num_nodes} nodes, {rounds} rounds", "ours", "Flower", "ratio")]
    rows += [(name, f"{a:.4g}", f"{b:.4g}", f"{b / a:.1f}") for name, a, b in zip(names, ours, theirs, strict=True)]
    print_table(rows)
    return 0


def measured(runtime: str, num_nodes: int, rounds: int) -> tuple[float, float, float]:
    """Run the app in a new process.

    Returns:
        Seconds of the whole run, seconds of a round, and processor seconds of a round.
    """
    arguments = ["-m", "simulations.benchmarks.apps", "--one", runtime, str(num_nodes), str(rounds)]
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=LONGEST, check=True
    )
    whole = time.perf_counter() - began
    ends = np.array(json.loads(done.stdout.splitlines()[-1]))
    wall, cpu = np.median(np.diff(ends, axis=0)[1:], axis=0).tolist()
    return whole, wall, cpu


def ends_of(runtime: str, num_nodes: int, rounds: int) -> list[tuple[float, float]]:
    """Run the app here, and return the wall-clock time and the processor time at the end of each round, seconds."""
    from flwr.app import Context, RecordDict

    logging.disable(logging.CRITICAL)
    server, client, ends = app(rounds)
    if runtime == "ours":
        from fedlearn.flower.in_process_grid import InProcessGrid

        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        server(grid=InProcessGrid(client, num_nodes), context=context)
    else:
        from flwr.simulation import run_simulation

        actors: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": num_cores()}}
        run_simulation(server, client, num_nodes, backend_config=actors)
    return ends


def app(rounds: int) -> tuple[Any, Any, list[tuple[float, float]]]:
    """Return a ServerApp, a ClientApp, and a list of times. The ServerApp adds a time at the end of each round."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    client, server, ends = ClientApp(), ServerApp(), []

    @client.train()
    def train(message: Any, context: Any) -> Message:
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    @client.evaluate()
    def evaluate(message: Any, context: Any) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}), reply_to=message)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        def note(round: int, arrays: Any) -> None:
            ends.append((time.perf_counter(), time.process_time()))

        start = ArrayRecord([np.zeros(SIZE, np.float32)])
        FedAvg().start(grid, start, num_rounds=rounds, timeout=LONGEST, evaluate_fn=note)

    return server, client, ends


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
