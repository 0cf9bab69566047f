"""The large model of `simulations.benchmarks.large` in PyTorch, and a plain loop over its clients.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedlearn import FederatedData
from fedlearn.trainers.torch import TorchTrainer

BATCH, STEPS = 20, 2


def network(width: int, num_inputs: int, num_classes: int) -> nn.Sequential:
    """Return a network with two hidden layers."""
    hidden = (nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(width, num_classes))


def build_trainer(width: int, num_inputs: int, num_classes: int) -> TorchTrainer:
    """Return the trainer of the network."""
    return TorchTrainer(network(width, num_inputs, num_classes), task="multiclass")


def plain_loop(width: int, data: FederatedData, *, num_classes: int) -> Callable[[], None]:
    """Return a round of federated averaging as a plain loop of torch, with one thread."""
    torch.set_num_threads(1)
    model = network(width, data.train(data.clients[0]).x.shape[1], num_classes)
    weights: list[Any] = list(model.parameters())

    def batches() -> Iterator[list[tuple[Any, Any]]]:
        for client in data.clients:
            examples = data.train(client)
            order = torch.randperm(len(examples)).split(BATCH)[:STEPS]
            yield [(torch.from_numpy(examples.x)[rows], torch.from_numpy(examples.y)[rows].long()) for rows in order]

    def run() -> None:
        with torch.no_grad():
            start, total = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights]
        for client_batches in batches():
            with torch.no_grad():
                torch._foreach_copy_(weights, start)
            for x_B, y_B in client_batches:
                gradients = torch.autograd.grad(cross_entropy(model(x_B), y_B), weights)
                with torch.no_grad():
                    torch._foreach_add_(weights, gradients, alpha=-0.01)
            with torch.no_grad():
                torch._foreach_add_(total, weights, alpha=1 / len(data.clients))
        with torch.no_grad():
            torch._foreach_copy_(weights, total)

    return run
