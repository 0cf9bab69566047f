"""``python -m simulations.benchmarks.apps [num_nodes] [rounds]``: one unmodified Flower app, without Ray and with it.

The app's client costs next to nothing, so that what is measured is the runtime: `fedlearn.flower.grid` in this process,
and Flower's own simulation with an actor on each core. The first round, in which Ray starts, is left out.

Shapes: D parameters laid flat.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from statistics import median
from typing import Any

import numpy as np

SIZE = 481  # parameters: the model of the scenario heart


def app(num_rounds: int) -> tuple[Any, Any, list[float]]:
    """A ServerApp, a ClientApp, and the times at which rounds end."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    client, server, ends = ClientApp(), ServerApp(), []

    @client.train()
    def train(message: Any, context: Any) -> Message:
        params_D = message.content["arrays"].to_numpy_ndarrays()[0]
        own_D = params_D + np.float32(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": ArrayRecord([own_D]), "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        start, strategy = ArrayRecord([np.zeros(SIZE, np.float32)]), FedAvg(fraction_evaluate=0.0)
        note = lambda round, arrays: ends.append(time.perf_counter())  # noqa: E731
        strategy.start(grid, start, num_rounds=num_rounds, timeout=600, evaluate_fn=note)

    return server, client, ends


def in_process(num_nodes: int, num_rounds: int) -> list[float]:
    """Seconds of each round but the first."""
    from flwr.app import Context, RecordDict

    from fedlearn.flower.grid import InProcessGrid

    server, client, ends = app(num_rounds)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    server(grid=InProcessGrid(client, num_nodes), context=context)
    return np.diff(ends)[1:].tolist()


def in_flower(num_nodes: int, num_rounds: int) -> list[float]:
    """Seconds of each round but the first."""
    from flwr.simulation import run_simulation

    server, client, ends = app(num_rounds)
    actors: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": os.cpu_count()}}
    run_simulation(server, client, num_nodes, backend_config=actors)
    return np.diff(ends)[1:].tolist()


def main() -> int:
    """Measure both and print a table."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    num_nodes, num_rounds = (int(word) for word in (*sys.argv[1:], "100", "4")[:2])
    logging.disable(logging.INFO)
    ours, theirs = (median(runtime(num_nodes, num_rounds)) for runtime in (in_process, in_flower))
    sys.stdout.write(f"in this process  {ours:8.4f} s a round of {num_nodes} nodes\n")
    sys.stdout.write(f"Flower and Ray   {theirs:8.4f} s\nratio            {theirs / ours:8.1f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
