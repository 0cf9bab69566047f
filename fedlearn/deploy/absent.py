"""A scenario whose data and framework are elsewhere: what a coordinator knows of the problem that its nodes work on.

Shapes: D parameters laid flat, N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from fedlearn.data.federated import FederatedData
from fedlearn.engines.grid import GridEngine
from fedlearn.errors import DataError
from fedlearn.layout import Layout
from fedlearn.local import LocalRule
from fedlearn.records import Array, ClientId, Order, Updates, Work
from fedlearn.scenario import Scenario


def absent_scenario(engine: GridEngine) -> Scenario:
    """The scenario of connected nodes: its name, task, clients and model; its examples stay where they are."""
    engine.open()
    homes = engine.members.homes()
    model = engine.members.settle()
    kinds = sorted({member.framework for member in homes.values()})
    data = FederatedData(
        task=model.task,
        clients=engine.clients,
        train=_elsewhere,
        test=_elsewhere,
        num_classes=model.num_classes,
        names={client: homes[client].names[client] for client in engine.clients},
        source=f"at {len(engine.members.present)} nodes",
        num_train={client: homes[client].num_examples[client] for client in engine.clients},
    )
    trainer = AbsentTrainer(engine=engine, framework="+".join(kinds), device="at the nodes", layout=engine.layout)
    return Scenario(name=model.name, data=data, trainer=trainer, model=model.model, partition=model.partition)


@dataclass(frozen=True, kw_only=True)
class AbsentTrainer:
    """Stands for trainers at the nodes: it knows their layout, and asks one of them for initial parameters.

    Args:
        engine: the way to them.
        framework: of all of them.
        device: in words.
        layout: of their model.
    """

    engine: GridEngine
    framework: str
    device: str
    layout: Layout
    private: bool = True  # as far as the coordinator knows; nodes see to it

    def init(self, seed: int) -> np.ndarray:
        """Initial ``params_D``, from the node of the lowest client."""
        return self.engine.initial_parameters(seed)

    def batched(self, batching: str) -> AbsentTrainer:
        """Itself: nodes choose."""
        return self

    def batching_of(self, num_clients: int, num_examples: int) -> str:
        """At the nodes."""
        return "at the nodes"

    def fit(self, order: Order, rule: LocalRule, work: Sequence[Work]) -> Updates:
        """Not here."""
        _elsewhere()

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Not here."""
        _elsewhere()


def _elsewhere(client: ClientId = -1) -> NoReturn:
    raise DataError("the examples are at the nodes, and stay there")
