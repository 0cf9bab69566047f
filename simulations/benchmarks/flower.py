"""Run a workload in Flower's simulation with Ray, with Flower's FedAvg and the client of the bare program.

Shapes: D parameters, N examples of one client.

The difference to ``bare`` is the cost of Flower. The client has no data loader and no optimizer object, and Flower
sends the model as one array. Flower is imported on first use.
"""

from __future__ import annotations

# mypy: disable-error-code="import-not-found"
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from fedlearn.core.layout import default_initial_parameters
from fedlearn.core.random import Purpose, generator
from simulations.benchmarks.clock import Clock, Done
from simulations.benchmarks.processes import num_cores
from simulations.benchmarks.workloads import SEED, Workload

ROUND_SECONDS = 600.0  # deadline of a round
ClientFit = Callable[[np.ndarray, int, np.ndarray], np.ndarray]  # (params_D, client, order_N) -> new params_D


def run(workload: Workload, framework: str, clock: Clock) -> Done:
    """Run federated averaging in Flower."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    cores = num_cores()
    actors: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": cores}}
    server, app = _Server(workload, framework, clock), ServerApp()
    app.main()(server.main)
    run_simulation(app, client_app(workload, framework), workload.num_clients, backend_config=actors)
    if len(clock.seconds) < workload.rounds:
        raise RuntimeError(f"Flower stopped after {len(clock.seconds)} of {workload.rounds} rounds")
    client = "Opacus" if workload.example_dp else "the client of bare"
    return Done(f"Ray, {cores} actors of 1 thread, {client}", server.params_D)


def client_app(workload: Workload, framework: str) -> Any:
    """Return a ClientApp that trains one client, starting from the global model."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Message:
        client, round = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
        order_N = np.random.default_rng((SEED, round, client)).permutation(workload.size(client))
        params_D = message.content["arrays"].to_numpy_ndarrays()[0]
        new_D = _client_fit(workload, framework)(params_D, client, order_N)
        metrics = MetricRecord({"num-examples": len(order_N)})
        return Message(RecordDict({"arrays": ArrayRecord([new_D]), "metrics": metrics}), reply_to=message)

    return app


@cache
def _client_fit(workload: Workload, framework: str) -> ClientFit:
    """Return the function that trains a client. Each process of Ray prepares it once."""
    program = "opacus_torch" if workload.example_dp else f"bare_{framework}"
    prepare: Callable[[Workload], ClientFit] = import_module(f"simulations.benchmarks.{program}").build_client_fit
    return prepare(workload)


class _Server:
    """Run the strategy. Its callbacks note the start and end of each round on the clock."""

    def __init__(self, workload: Workload, framework: str, clock: Clock) -> None:
        self.workload, self.clock = workload, clock
        layout = import_module(f"simulations.benchmarks.bare_{framework}").layout_of(workload)
        self.params_D: np.ndarray = default_initial_parameters(layout, generator(SEED, Purpose.INIT))
        self._num_examples = 0

    def main(self, grid: Any, context: Any) -> None:
        """Run all rounds of the workload."""
        from flwr.app import ArrayRecord
        from flwr.serverapp.strategy import FedAvg

        work = self.workload
        strategy = FedAvg(
            fraction_train=work.cohort_size / work.num_clients,
            fraction_evaluate=0.0,
            min_train_nodes=work.cohort_size,
            min_available_nodes=work.num_clients,
            train_metrics_aggr_fn=self._count_examples,
        )
        start = ArrayRecord([self.params_D])
        strategy.start(grid, start, num_rounds=work.rounds, timeout=ROUND_SECONDS, evaluate_fn=self._note_round)

    def _count_examples(self, replies: list[Any], key: str) -> Any:
        from flwr.app import MetricRecord

        if len(replies) < self.workload.cohort_size:
            raise RuntimeError(f"only {len(replies)} of {self.workload.cohort_size} clients replied")
        self._num_examples = sum(reply["metrics"][key] for reply in replies)
        return MetricRecord({key: self._num_examples})

    def _note_round(self, round: int, arrays: Any) -> None:
        if round:
            self.clock.lap(self._num_examples)
            self.params_D = arrays.to_numpy_ndarrays()[0]
        else:
            self.clock.start()
