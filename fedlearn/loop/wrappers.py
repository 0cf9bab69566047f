"""Wrap an engine or a trainer, and forward all members that a subclass does not define.

Shapes: D parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.layout import Layout
from fedlearn.core.model_report import ModelReport
from fedlearn.core.records import (
    Array,
    ClientEvaluation,
    ClientId,
    Examples,
    Failure,
    LocalSettings,
    Predictions,
    Request,
    State,
    Updates,
)
from fedlearn.loop.protocols import Engine, Trainer


class EngineWrapper:
    """Wrap an engine and forward every member that a subclass does not define.

    Args:
        engine: the inner engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def clients(self) -> Sequence[ClientId]:
        """Ids of all clients of the inner engine."""
        return self.engine.clients

    @property
    def layout(self) -> Layout:
        """Names, shapes and offsets of the model's parameters."""
        return self.engine.layout

    @property
    def client_states(self) -> dict[ClientId, State]:
        """The client states of the inner engine."""
        return self.engine.client_states

    @client_states.setter
    def client_states(self, client_states: dict[ClientId, State]) -> None:
        self.engine.client_states = client_states

    @property
    def in_process(self) -> bool:
        """True if the inner engine trains in this process."""
        return self.engine.in_process

    @property
    def deployed(self) -> bool:
        """True if the clients of the inner engine are real."""
        return self.engine.deployed

    @property
    def elapsed_s(self) -> float | None:
        """Duration of the last round of the inner engine, in virtual seconds."""
        return self.engine.elapsed_s

    @property
    def mixed_block_size(self) -> int:
        """The largest block of requests from different rounds."""
        return self.engine.mixed_block_size

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Train the cohort with the inner engine. See `Engine.fit`."""
        return self.engine.fit(request, strategy, cohort)

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[Predictions | ClientEvaluation | Failure]:
        """Yield predictions or metric sums of the inner engine. See `Engine.evaluate`."""
        if personal_strategy is None:
            return self.engine.evaluate(params_D, cohort)
        return self.engine.evaluate(params_D, cohort, personal_strategy)

    def describe(self, cohort_size: int) -> str:
        """Return how the inner engine trains a cohort of this size."""
        return self.engine.describe(cohort_size)

    def close(self) -> None:
        """Release workers and connections of the inner engine."""
        self.engine.close()


class TrainerWrapper:
    """Wrap a trainer and forward every member that a subclass does not define.

    Args:
        trainer: the inner trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def framework(self) -> str:
        """The framework of the inner trainer."""
        return self.trainer.framework

    @property
    def device(self) -> str:
        """The device of the inner trainer."""
        return self.trainer.device

    @property
    def layout(self) -> Layout:
        """Names, shapes and offsets of the model's parameters."""
        return self.trainer.layout

    @property
    def initialization(self) -> str:
        """One phrase on the source of the initial parameters."""
        return self.trainer.initialization

    @property
    def supports_dp_sgd(self) -> bool:
        """True if the inner trainer has DP-SGD."""
        return self.trainer.supports_dp_sgd

    @property
    def rule_hooks(self) -> frozenset[str]:
        """Names of the functions of a local rule that the inner trainer applies."""
        return self.trainer.rule_hooks

    @property
    def supports_process_pool(self) -> bool:
        """True if the inner trainer can train in forked processes."""
        return self.trainer.supports_process_pool

    @property
    def clients_per_step(self) -> int:
        """Number of clients whose steps share work in the inner trainer."""
        return self.trainer.clients_per_step

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """Return how the inner trainer trains a block of this size."""
        return self.trainer.describe_batching(num_clients, num_examples)

    def close(self) -> None:
        """Release processes and memory of the inner trainer."""
        self.trainer.close()

    def check_local(self, local: LocalSettings) -> None:
        """Check the settings of local training with the inner trainer."""
        self.trainer.check_local(local)

    def check_model(self, examples: Examples, *, synthetic: bool = False) -> ModelReport:
        """Check the model of the inner trainer."""
        return self.trainer.check_model(examples, synthetic=synthetic)

    def check_example_dp(self, request: Request, examples: Examples) -> None:
        """Check the model of the inner trainer for DP-SGD."""
        self.trainer.check_example_dp(request, examples)

    def init(self, seed: int) -> np.ndarray:
        """Return the initial parameters of the inner trainer."""
        return self.trainer.init(seed)

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Return raw outputs ``(N, C)`` of the inner trainer."""
        return self.trainer.predict(params_D, x)
