"""Provide small problems and a trainer without a framework, for tests.

Shapes: K clients in a block, D parameters, N examples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import ceil

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.records import Examples, LocalSettings
from fedlearn.loop.protocols import Trainer
from fedlearn.robust.root_dataset import with_root_dataset
from fedlearn.testing.adapters import AdapterTrainer
from fedlearn.testing.networks import HiddenLayerTrainer
from fedlearn.trainers.base import BaseTrainer


class LinearTrainer(BaseTrainer):
    """Train linear regression in NumPy. It is the smallest trainer, and a reference for others.

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


def linear_problem(
    *, num_clients: int = 6, num_features: int = 3, seed: int = 0, max_examples: int | None = None
) -> FederatedData:
    """Return a small regression problem: clients have different sizes and different weights."""
    rng = np.random.default_rng(seed)
    held = {}
    for client in range(num_clients):
        size = min(5 + 4 * client, max_examples or 5 + 4 * client)
        x = rng.normal(size=(size, num_features)).astype(np.float32)
        y = x @ rng.normal(1, 0.3, num_features) + rng.normal(0, 0.1, len(x))
        held[client] = Examples(x, y.astype(np.float32))
    return FederatedData(
        task="regression", num_classes=1, clients=range(num_clients), train=held.__getitem__, test=held.__getitem__
    )


def class_problem(*, num_clients: int = 6, num_features: int = 3, num_classes: int = 3, seed: int = 0) -> FederatedData:
    """Return a small classification problem: clients have different sizes and class balances."""
    rng = np.random.default_rng(seed)
    held = {}
    for client in range(num_clients):
        x = rng.normal(size=(5 + 4 * (client % 6), num_features)).astype(np.float32)
        weights_FC = np.eye(num_features, num_classes) + rng.normal(0, 0.3, (num_features, num_classes))
        held[client] = Examples(x, np.argmax(x @ weights_FC, axis=1))
    return FederatedData(
        task="multiclass",
        num_classes=num_classes,
        clients=range(num_clients),
        train=held.__getitem__,
        test=held.__getitem__,
    )


def problem_for(strategy: Strategy) -> tuple[FederatedData, Trainer]:
    """Return data and a trainer that meet the stated needs of a strategy.

    A strategy may need a number of clients (cohort or buffer), classes, or features of a hidden layer. It may also need
    names of personal or frozen parameters, adapters that a server merges, or root examples.
    """
    rule, num_clients = strategy.local, num_clients_for(strategy)
    linear = LinearTrainer(3)
    if strategy.merges_adapters:
        return class_problem(num_clients=num_clients), AdapterTrainer(3, 3, is_mergeable=True)
    if rule.has_custom_loss or not _can_share(linear.layout, rule.unshared_parameters):
        data = class_problem(num_clients=num_clients)
        trainer: Trainer = HiddenLayerTrainer(3, 3, shifts=_missing_names(rule.unshared_parameters))
    else:
        data, trainer = linear_problem(num_clients=num_clients, max_examples=25), linear
    if strategy.root is None or strategy.root.num_examples is None:
        return data, trainer
    available = sum(len(data.train(client)) for client in data.clients)
    root = replace(strategy.root, num_examples=min(strategy.root.num_examples, available))
    return with_root_dataset(data, root, seed=1), trainer


def num_clients_for(strategy: Strategy) -> int:
    """Return a number of clients from which the strategy can select."""
    law, least = strategy.select.law, NUM_CLIENTS
    if law is not None and law.size is not None:
        least = max(least, ceil(law.size) * (law.separation or 1)) if law.kind != "poisson" else ceil(law.size)
    if law is not None and law.rate is not None:
        least = max(least, ceil(10 / law.rate))
    if strategy.asynchrony is not None:
        least = max(least, strategy.asynchrony.buffer_size)
    return max(least, 1 + (strategy.root.client if strategy.root else 0))


def _can_share(layout: Layout, patterns: Sequence[str]) -> bool:
    """Return whether each pattern matches a parameter, and some parameter is left to share."""
    names = [leaf.name for leaf in layout.leaves]
    used = all(any(fnmatchcase(name, pattern) for name in names) for pattern in patterns)
    return used and (not patterns or bool(layout.without(tuple(patterns)).leaves))


def _missing_names(patterns: Sequence[str]) -> list[str]:
    """Return names of parameters to add to the network, so that the patterns fit it."""
    layout = HiddenLayerTrainer(3, 3).layout
    missing = [p for p in patterns if not any(fnmatchcase(leaf.name, p) for leaf in layout.leaves)]
    names = [re.sub(r"[*?]", "x", re.sub(r"\[!?(.)[^]]*\]", r"\1", pattern)) for pattern in missing]
    return names if _can_share(layout, [p for p in patterns if p not in missing]) else [*names, "shared"]


LOCAL_SETTINGS = LocalSettings(batch_size=4, learning_rate=0.05)
NUM_CLIENTS = 12
