"""Train one model in several frameworks: each client trains in one of them.

Shapes: K clients in a block, D parameters laid flat, N examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.model_report import ModelReport
from fedlearn.core.records import Array, ClientId, ClientWork, Examples, LocalSettings, MetricSum, Request, Updates
from fedlearn.errors import FedlearnError
from fedlearn.loop.protocols import Trainer


class MixedTrainer:
    """Train client ``c`` with trainer ``c mod n`` of n trainers of one model.

    With two trainers, clients with even ids use the first trainer and clients with odd ids use the second.

    Args:
        trainers: trainers of models with equal layouts, for example one model in torch and in JAX.

    *Guarantees*: an update depends only on the client and its trainer, not on the other clients of the block. For
    smooth models (no ReLU at its kink), 10 rounds give parameters within 1e-4 of training in one framework.

    Raises:
        FedlearnError: The layouts differ.
    """

    framework = "mixed"
    supports_process_pool = False
    clients_per_step = 1

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = tuple(trainers)
        self.layout: Layout = trainers[0].layout
        self.device = trainers[0].device
        self.initialization = trainers[0].initialization
        self.supports_dp_sgd = all(trainer.supports_dp_sgd for trainer in trainers)
        self.rule_hooks = frozenset.intersection(*(trainer.rule_hooks for trainer in trainers))
        for trainer in trainers[1:]:
            if trainer.layout != self.layout:
                raise FedlearnError(
                    f"the models in {trainers[0].framework} and {trainer.framework} have different layouts\n"
                    "  advice    the same model in both frameworks"
                )

    def init(self, seed: int) -> np.ndarray:
        """Return initial ``params_D``, which are equal in all frameworks."""
        return self.trainers[0].init(seed)

    def with_batching(self, batching: str) -> MixedTrainer:
        """Return a mixed trainer whose trainers train a block in this way."""
        return MixedTrainer([trainer.with_batching(batching) for trainer in self.trainers])

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """Return how each framework would train its share of a block of this size."""
        share_clients = -(-num_clients // len(self.trainers))
        share_examples = num_examples * share_clients // num_clients
        return " + ".join(
            f"{trainer.framework} {trainer.describe_batching(share_clients, share_examples)}"
            for trainer in self.trainers
        )

    def close(self) -> None:
        """Close the trainers of all frameworks."""
        for trainer in self.trainers:
            trainer.close()

    def trainer_of(self, client: ClientId) -> Trainer:
        """Return the trainer that trains this client."""
        return self.trainers[client % len(self.trainers)]

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients, each with its trainer. Return updates as NumPy arrays, in the order of ``work``."""
        all_rows, parts = [], []
        for trainer in self.trainers:
            rows = [k for k, client_work in enumerate(work) if self.trainer_of(client_work.client) is trainer]
            if rows:
                all_rows += rows
                parts.append(trainer.fit(request, rule, [work[k] for k in rows]))
        return _concatenate(parts).rows(np.argsort(all_rows))

    def check_local(self, local: LocalSettings) -> None:
        """Check the settings of local training with the trainer of each framework."""
        for trainer in self.trainers:
            trainer.check_local(local)

    def check_model(self, examples: Examples, *, synthetic: bool = False) -> ModelReport:
        """Check the model in each framework. Return the report of the first trainer."""
        reports = [trainer.check_model(examples, synthetic=synthetic) for trainer in self.trainers]
        return reports[0]

    def check_example_dp(self, request: Request, examples: Examples) -> None:
        """Check the model of each framework for DP-SGD."""
        for trainer in self.trainers:
            trainer.check_example_dp(request, examples)

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Return raw outputs ``(N, C)`` of the first trainer. The other trainers differ by rounding errors only."""
        return self.trainers[0].predict(params_D, x)


def _concatenate(parts: Sequence[Updates]) -> Updates:
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
        client_state={
            name: np.concatenate([as_numpy(part.client_state[name]) for part in parts])
            for name in parts[0].client_state
        },
    )
