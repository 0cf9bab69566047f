"""Build the coordinator's scenario, whose examples and framework are at the nodes.

Shapes: D parameters, N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from fedlearn.algorithm.local_rule import HOOKS, LocalRule
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.model_report import ModelReport
from fedlearn.core.records import Array, ClientId, ClientWork, Examples, LocalSettings, Request, Updates
from fedlearn.engines.deployed import DeployedEngine
from fedlearn.errors import DataError
from fedlearn.loop.scenario import Scenario


def remote_scenario(engine: DeployedEngine) -> Scenario:
    """Return the scenario of the connected nodes, with name, task, clients and model; examples stay at the nodes.

    Raises:
        FederationError: Too few sites joined.
    """
    engine.open()
    members = engine.membership.members_by_client()
    model = engine.membership.model
    frameworks = sorted({member.framework for member in members.values()})
    data = FederatedData(
        task=engine.task,
        clients=engine.clients,
        train=_refuse_access,
        test=_refuse_access,
        num_classes=model.num_classes,
        names={client: members[client].names[client] for client in engine.clients},
        source=f"at {len(engine.membership.present)} nodes",
        num_train={client: members[client].num_examples[client] for client in engine.clients},
    )
    trainer = RemoteTrainer(engine=engine, framework="+".join(frameworks), device="at the nodes", layout=engine.layout)
    return Scenario(
        name=model.name,
        data=data,
        trainer=trainer,
        model=model.model,
        partition=model.partition,
        base_digest=model.base_digest,
    )


@dataclass(frozen=True, kw_only=True)
class RemoteTrainer:
    """Represent the trainers at the nodes, with their layout. A node returns the initial parameters.

    Args:
        engine: engine with the connection to the nodes.
        framework: frameworks of all nodes, e.g. ``jax+torch``.
        device: text for the header.
        layout: layout of the model at the nodes.
    """

    engine: DeployedEngine
    framework: str
    device: str
    layout: Layout
    initialization: str = "weights from a node"
    supports_dp_sgd: bool = True  # the coordinator cannot check this; each node checks it
    supports_process_pool: bool = False
    clients_per_step: int = 1
    rule_hooks: frozenset[str] = frozenset(HOOKS)  # the coordinator cannot check this; each node checks it

    def close(self) -> None:
        """Do nothing, because this trainer has no resources to release."""

    def init(self, seed: int) -> np.ndarray:
        """Return initial ``params_D``, from the node of the client with the lowest id."""
        return self.engine.initial_parameters(seed)

    def with_batching(self, batching: str) -> RemoteTrainer:
        """Return this trainer, because each node chooses its own batching."""
        return self

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """Return a text that names the place of training."""
        return "at the nodes"

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Raise `DataError`, because only nodes can train."""
        _refuse_access()

    def check_local(self, local: LocalSettings) -> None:
        """Check nothing: each node checks the settings with its trainer."""

    def check_model(self, examples: Examples, *, synthetic: bool = False) -> ModelReport:
        """Raise `DataError`, because each node checks its model."""
        _refuse_access()

    def check_example_dp(self, request: Request, examples: Examples) -> None:
        """Raise `DataError`, because each node checks its model."""
        _refuse_access()

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Raise `DataError`, because only nodes can predict."""
        _refuse_access()


def _refuse_access(client: ClientId = -1) -> NoReturn:
    raise DataError("the examples are at the nodes, and the coordinator cannot access them")
