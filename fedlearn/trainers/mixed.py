"""One federation, several frameworks: each client trains in its own.

Shapes: K clients in a block, D parameters laid flat, N examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array, ClientId, ClientWork, MetricSum, Request, Updates
from fedlearn.errors import FedlearnError
from fedlearn.loop.protocols import Trainer


class MixedTrainer:
    """Train client ``c`` with trainer ``c mod n`` of n trainers of one model: with two, even and odd clients differ.

    Args:
        trainers: of models with equal layouts, e.g. one in torch and its twin in JAX.

    *Guarantees*: a client's update is that of its own trainer, whoever else is in the block; after 10 rounds the model
    is within 1e-4 of one trained in either framework alone, for models that are smooth (no ReLU at its kink).

    Raises:
        FedlearnError: the layouts differ.
    """

    framework = "mixed"
    supports_process_pool = False

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = tuple(trainers)
        self.layout: Layout = trainers[0].layout
        self.device = trainers[0].device
        self.initialization = trainers[0].initialization
        self.supports_dp_sgd = all(trainer.supports_dp_sgd for trainer in trainers)
        for trainer in trainers[1:]:
            if trainer.layout != self.layout:
                raise FedlearnError(f"{trainer.framework} and {trainers[0].framework} have models of different layouts")

    def init(self, seed: int) -> np.ndarray:
        """Initial ``params_D``, the same in all of them."""
        return self.trainers[0].init(seed)

    def with_batching(self, batching: str) -> MixedTrainer:
        """The same, each trainer batched so."""
        return MixedTrainer([trainer.with_batching(batching) for trainer in self.trainers])

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """How a block of so many clients would be trained, framework by framework."""
        share = -(-num_clients // len(self.trainers))
        own = num_examples * share // num_clients
        return " + ".join(f"{one.framework} {one.describe_batching(share, own)}" for one in self.trainers)

    def close(self) -> None:
        """Close all trainers."""
        for trainer in self.trainers:
            trainer.close()

    def trainer_of(self, client: ClientId) -> Trainer:
        """The trainer of a client."""
        return self.trainers[client % len(self.trainers)]

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients, each with its own trainer; updates come as NumPy arrays, in the order of ``work``."""
        rows, parts = [], []
        for trainer in self.trainers:
            own = [k for k, one in enumerate(work) if self.trainer_of(one.client) is trainer]
            if own:
                rows += own
                parts.append(trainer.fit(request, rule, [work[k] for k in own]))
        return _end_to_end(parts).rows(np.argsort(rows))

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Raw outputs ``(N, C)``, by the first trainer: a client's outputs differ between them by rounding only."""
        return self.trainers[0].predict(params_D, x)


def _end_to_end(parts: Sequence[Updates]) -> Updates:
    names = parts[0].metrics
    return Updates(
        clients_K=np.concatenate([part.clients_K for part in parts]),
        delta_KD=np.concatenate([as_numpy(part.delta_KD) for part in parts]),
        num_examples_K=np.concatenate([part.num_examples_K for part in parts]),
        num_steps_K=np.concatenate([part.num_steps_K for part in parts]),
        metrics={
            name: MetricSum(
                np.concatenate([np.asarray(part.metrics[name].total_K) for part in parts]),
                np.concatenate([np.asarray(part.metrics[name].count_K) for part in parts]),
            )
            for name in names
        },
    )
