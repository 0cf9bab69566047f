"""``python -m simulations.benchmarks.apps [num_nodes] [rounds] [repeats]``: one Flower app, without Ray and with it.

The app is not changed for either. Its clients train and evaluate at next to no cost, so that what is measured is the
runtime: ours in one process (`fedlearn.flower.in_process_grid`), and Flower's own simulation with an actor per core.
Each run is a process of its own, in turn. Told are the medians of a whole run, imports and the start of Ray included,
of a round but the first, and of its processor time in the ServerApp's process. Other work on the machine does not
touch that.
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

SIZE = 481  # parameters: the model of the scenario heart
LONGEST = 600.0  # seconds of a run
RUNTIMES = ("ours", "flower")


def main(argv: list[str]) -> int:
    """Measure both and print a table; in a child, run one of them and print when its rounds ended."""
    if argv[0:1] == ["--one"]:
        sys.stdout.write(json.dumps(ends_of(argv[1], int(argv[2]), int(argv[3]))))
        return 0
    num_nodes, rounds, repeats = (int(word) for word in (argv + ["100", "4", "3"][len(argv) :]))
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
    """Seconds of a whole run, of a round, and of the processor in a round."""
    words = ["-m", "simulations.benchmarks.apps", "--one", runtime, str(num_nodes), str(rounds)]
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=LONGEST, check=True
    )
    whole = time.perf_counter() - began
    ends = np.array(json.loads(done.stdout.splitlines()[-1]))
    wall, cpu = np.median(np.diff(ends, axis=0)[1:], axis=0).tolist()
    return whole, wall, cpu


def ends_of(runtime: str, num_nodes: int, rounds: int) -> list[tuple[float, float]]:
    """When each round of the app ended, by the clock and by the processor's time of this process."""
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
    """A ServerApp, a ClientApp, and the times at which rounds end, filled while it runs."""
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
