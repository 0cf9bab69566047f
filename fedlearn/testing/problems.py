"""Provide a small problem and a trainer without a framework, for tests.

Shapes: K clients in a block, D parameters, N examples.
"""

from __future__ import annotations

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.records import Examples, LocalSettings
from fedlearn.trainers.base import BaseTrainer


class LinearTrainer(BaseTrainer):
    """Linear regression in NumPy: the smallest trainer, and a reference for others.

    Args:
        num_features: number of features of an example.
    """

    supports_dp_sgd = True

    def __init__(self, num_features: int) -> None:
        self.layout = Layout.from_shapes([("out.weight", (1, num_features)), ("out.bias", (1,))])

    def outputs(self, params_D: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return ``x w + b``, ``(N, 1)``."""
        return x @ params_D[1:, None] + params_D[0]

    def gradient(self, params_D: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the squared errors and the gradient of their mean."""
        error_N = self.predict(params_D, x)[:, 0] - y
        bias_and_weight = [np.mean(error_N, keepdims=True), error_N @ x / len(x)]
        return error_N**2, 2 * np.concatenate(bias_and_weight)

    def example_gradients(self, params_D: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the squared errors and their gradients."""
        error_N = self.predict(params_D, x)[:, 0] - y
        return error_N**2, 2 * error_N[:, None] * np.concatenate([np.ones((len(x), 1)), x], axis=1)


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
