"""Run a workload in pfl-research (PyPI: pfl), with its PyTorch model.

The program follows the CIFAR-10 benchmark of pfl-research: `SimulatedBackend`, `FederatedAveraging`, updates weighted
by examples. pfl is imported on first use.
"""

from __future__ import annotations

# mypy: disable-error-code="import-not-found"
import logging
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from fedlearn.core.layout import default_initial_parameters
from fedlearn.core.random import Purpose, generator
from simulations.benchmarks.bare_torch import layout_of
from simulations.benchmarks.clock import Clock, Done
from simulations.benchmarks.models_torch import module
from simulations.benchmarks.synthetic import examples_of, pool_of
from simulations.benchmarks.workloads import SEED, Workload


def run(workload: Workload, framework: str, clock: Clock) -> Done:
    """Run federated averaging in pfl-research, in one process."""
    from pfl.algorithm.federated_averaging import FederatedAveraging

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, rounds = _model(workload), _rounds(clock)
    central, local = _settings(workload)
    backend = _backend(workload, rounds)
    FederatedAveraging().run(central, backend, model, local, callbacks=[rounds], send_metrics_to_platform=False)
    named = {name: p.detach().numpy() for name, p in model.pytorch_model.named_parameters()}
    return Done("SimulatedBackend, 1 process of 1 thread", layout_of(workload).pack(named))


def _rounds(clock: Clock) -> Any:
    """Return a callback that notes the start and end of each round on the clock."""
    from pfl.callback.base import TrainingProcessCallback
    from pfl.metrics import Metrics

    class Rounds(TrainingProcessCallback):
        num_examples = 0

        def on_train_begin(self, *, model: Any) -> Any:
            clock.start()
            return Metrics()

        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            clock.lap(self.num_examples)
            self.num_examples = 0
            return False, Metrics()

    return Rounds()


def _settings(workload: Workload) -> tuple[Any, Any]:
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.hyperparam.base import NNTrainHyperParams

    central = NNAlgorithmParams(
        central_num_iterations=workload.rounds,
        evaluation_frequency=workload.rounds + 1,
        train_cohort_size=workload.cohort_size,
        val_cohort_size=None,
    )
    rate, size = workload.local.learning_rate, workload.batch_size
    return central, NNTrainHyperParams(local_num_epochs=1, local_learning_rate=rate, local_batch_size=size)


def _backend(workload: Workload, rounds: Any) -> Any:
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset

    pool_of(workload)
    rng = np.random.default_rng(SEED)

    def dataset(client: int) -> Any:
        examples = examples_of(workload, client)
        order_N = torch.from_numpy(rng.permutation(len(examples)))
        rounds.num_examples += len(examples)
        return Dataset((torch.from_numpy(examples.x)[order_N], torch.from_numpy(examples.y)[order_N]))

    clients = FederatedDataset(dataset, partial(rng.integers, workload.num_clients))
    return SimulatedBackend(training_data=clients, val_data=None, postprocessors=[WeightByDatapoints()])


def _model(workload: Workload) -> Any:
    """Return the workload's module with the two methods that pfl requires, and with the common initial parameters."""
    from pfl.model.pytorch import PyTorchModel

    network, layout = module(workload), layout_of(workload)
    start = layout.unpack(default_initial_parameters(layout, generator(SEED, Purpose.INIT)))
    network.load_state_dict({name: torch.from_numpy(v.copy()) for name, v in start.items()})
    binary = workload.task == "binary"

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        outputs = network.train()(x)
        if binary:
            return F.binary_cross_entropy_with_logits(outputs[:, 0], y.float())
        return F.cross_entropy(outputs, y)

    network.__dict__ |= {"loss": loss, "metrics": lambda *examples, **options: {}}
    return PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), 1.0))
