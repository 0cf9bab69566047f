"""Provide a small problem and a trainer without a framework, for tests.

Shapes: K clients in a block, D parameters, N examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout, default_initial_parameters
from fedlearn.core.records import Array, ClientWork, Examples, LocalSettings, MetricSum, Request, Updates
from fedlearn.trainers.base import FROM_SEED, initial_parameters, require_features
from fedlearn.trainers.batching import batch_plans, rounds_of


class LinearTrainer:
    """Linear regression in NumPy: the smallest whole trainer, and a reference for the others.

    Args:
        num_features: of one example.
    """

    framework = "numpy"
    device = "cpu"
    supports_dp_sgd = False
    initialization = FROM_SEED

    def __init__(self, num_features: int) -> None:
        self.layout = Layout.from_shapes([("out.weight", (1, num_features)), ("out.bias", (1,))])

    def init(self, seed: int) -> np.ndarray:
        """Initial ``params_D``."""
        return initial_parameters(self.layout, default_initial_parameters, seed)

    def with_batching(self, batching: str) -> LinearTrainer:
        """Itself: there is one way only."""
        return self

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """One client after another."""
        return "map"

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Minibatch SGD on the squared error, client after client."""
        if request.local.example_dp and not self.supports_dp_sgd:
            raise NotImplementedError("the linear trainer has no DP-SGD")
        require_features(rule.feature_penalty is None)
        results = [self._fit_client(request, rule, one) for one in work]
        losses_K, counts_K, steps_K = (np.array(column) for column in list(zip(*results, strict=True))[1:])
        return Updates(
            clients_K=np.array([one.client for one in work], np.int64),
            delta_KD=np.stack([delta_D for delta_D, *_ in results]),
            num_examples_K=np.array([len(one.examples) for one in work], np.int64),
            num_steps_K=steps_K,
            metrics={"loss": MetricSum(losses_K, counts_K)},
        )

    def _fit_client(self, order: Request, rule: LocalRule, one: ClientWork) -> tuple[np.ndarray, float, int, int]:
        w_global_D = np.asarray(order.params_D)
        vectors = {name: one.client_state[name] for name in rule.client_state} | {
            n: as_numpy(order.broadcast[n]) for n in rule.receives
        }
        start_D = w_global_D if one.start_D is None else np.asarray(one.start_D)
        w_D, loss = start_D.copy(), 0.0
        rounds = rounds_of(order, [one])
        (plan,), _ = batch_plans(order, np.array([one.client]), np.array([len(one.examples)]), rounds)
        for rows in plan:
            x, y = one.examples.x[rows[rows >= 0]], one.examples.y[rows[rows >= 0]]
            error_N = self.predict(w_D, x)[:, 0] - y
            loss += float(np.sum(error_N**2))
            bias_and_weight = [np.mean(error_N, keepdims=True), error_N @ x / len(x)]
            grad_D = rule.correct(2 * np.concatenate(bias_and_weight), w_D, w_global_D, **vectors)
            w_D = w_D - order.local.learning_rate * grad_D
        return (w_D - start_D).astype(np.float32), loss, int((plan >= 0).sum()), len(plan)

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """``x w + b``, ``(N, 1)``."""
        return x @ params_D[1:, None] + params_D[0]


def linear_problem(*, num_clients: int = 6, num_features: int = 3, seed: int = 0) -> FederatedData:
    """A small regression problem: clients of uneven size that disagree about the weights."""
    rng = np.random.default_rng(seed)
    held = {}
    for client in range(num_clients):
        x = rng.normal(size=(5 + 4 * client, num_features)).astype(np.float32)
        y = x @ rng.normal(1, 0.3, num_features) + rng.normal(0, 0.1, len(x))
        held[client] = Examples(x, y.astype(np.float32))
    return FederatedData(
        task="regression", num_classes=1, clients=range(num_clients), train=held.__getitem__, test=held.__getitem__
    )


LOCAL_SETTINGS = LocalSettings(batch_size=4, learning_rate=0.05)
