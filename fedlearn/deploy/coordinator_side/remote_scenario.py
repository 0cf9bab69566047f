"""A scenario whose data and framework are elsewhere: what a coordinator knows of the problem that its nodes work on.

Shapes: D parameters laid flat, N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.records import Array, ClientId, ClientWork, Request, Updates
from fedlearn.engines.deployed import DeployedEngine
from fedlearn.errors import DataError
from fedlearn.loop.scenario import Scenario


def remote_scenario(engine: DeployedEngine) -> Scenario:
    """The scenario of connected nodes: its name, task, clients and model; its examples stay where they are."""
    engine.open()
    homes = engine.membership.members_by_client()
    model = engine.membership.require_same_model()
    kinds = sorted({member.framework for member in homes.values()})
    data = FederatedData(
        task=model.task,
        clients=engine.clients,
        train=_elsewhere,
        test=_elsewhere,
        num_classes=model.num_classes,
        names={client: homes[client].names[client] for client in engine.clients},
        source=f"at {len(engine.membership.present)} nodes",
        num_train={client: homes[client].num_examples[client] for client in engine.clients},
    )
    trainer = RemoteTrainer(engine=engine, framework="+".join(kinds), device="at the nodes", layout=engine.layout)
    return Scenario(name=model.name, data=data, trainer=trainer, model=model.model, partition=model.partition)


@dataclass(frozen=True, kw_only=True)
class RemoteTrainer:
    """Stands for trainers at the nodes: it knows their layout, and asks one of them for initial parameters.

    Args:
        engine: the way to them.
        framework: of all of them.
        device: in words.
        layout: of their model.
    """

    engine: DeployedEngine
    framework: str
    device: str
    layout: Layout
    initialization: str = "weights from a node"
    supports_dp_sgd: bool = True  # as far as the coordinator knows; nodes see to it
    supports_process_pool: bool = False

    def close(self) -> None:
        """See `Trainer.close`; there is nothing to release."""

    def init(self, seed: int) -> np.ndarray:
        """Initial ``params_D``, from the node of the lowest client."""
        return self.engine.initial_parameters(seed)

    def with_batching(self, batching: str) -> RemoteTrainer:
        """Itself: nodes choose."""
        return self

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """At the nodes."""
        return "at the nodes"

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Not here."""
        _elsewhere()

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Not here."""
        _elsewhere()


def _elsewhere(client: ClientId = -1) -> NoReturn:
    raise DataError("the examples are at the nodes, and stay there")
