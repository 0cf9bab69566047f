"""What the loop asks of an engine, and what engines in this process share.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.layout import Layout
from fedlearn.core.records import (
    Array,
    ClientEvaluation,
    ClientId,
    ClientWork,
    Failure,
    InFlight,
    Predictions,
    Request,
    State,
    Updates,
)


class Engine(Protocol):
    """Takes an order to a cohort and brings back updates, in ascending order of client ids.

    Attributes:
        clients: all clients, sized and indexable.
        layout: of the model that it trains.
        client_states: what each client keeps for itself, by client; a checkpoint saves and restores it.
        deployed: whether its clients are real ones: their noise must then not follow from the run's seed.
    """

    clients: Sequence[ClientId]
    layout: Layout
    client_states: dict[ClientId, State]
    deployed: bool

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Train the cohort; an engine may fold what its aggregator can merge (see `fedlearn.algorithm.aggregation.accumulate`)."""
        ...

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[Predictions | ClientEvaluation | Failure]:
        """The model's outputs on the held-out part of each client, or what a client tells of them.

        With ``personal_strategy``, a strategy, each client uses its own model: what it keeps under it, completed by ``params_D``.
        """
        ...

    def describe(self, cohort_size: int) -> str:
        """How a cohort of so many clients is trained, for the header."""
        ...

    def close(self) -> None:
        """Let go of workers and connections."""
        ...


class Completion(NamedTuple):
    """The end of an order that was under way.

    Attributes:
        request_index: which of those that were handed over.
        result: what the client brought, or why it brought nothing.
        clock: when, in seconds since the run began.
    """

    request_index: int
    result: Updates | Failure
    clock: float


@runtime_checkable
class AsyncEngine(Protocol):
    """What an asynchronous strategy asks of an engine besides."""

    def wait_for_next(self, strategy: Strategy, in_flight: Sequence[InFlight], clock: float) -> Completion:
        """Wait for the next of these orders, of one client each, to end.

        Those that were not handed over before are sent out; what was, and is no longer among them, is given up. All
        that matters is in the arguments, so that a run which goes on from a checkpoint finds the same orders under way.
        """
        ...


@runtime_checkable
class MixedRoundEngine(Protocol):
    """An engine that trains clients as one block though their orders differ in age.

    Attributes:
        mixed_block_size: clients in such a block at most.
    """

    mixed_block_size: int

    def fit_mixed_rounds(self, strategy: Strategy, block: Sequence[InFlight]) -> Iterator[Updates | Failure]:
        """Train a block under a rule that `fedlearn.loop.local_training.supports_mixed_rounds`; no client is there twice."""
        ...


class Trainer(Protocol):
    """The only thing that knows a framework.

    Attributes:
        framework: ``torch``, ``jax`` or ``numpy``, for the header.
        device: where it computes, e.g. ``cpu``.
        layout: of the model's trainable parameters, and of its buffers: statistics of batches.
        supports_dp_sgd: whether it has DP-SGD, for orders with ``local.example_dp``.
    """

    @property
    def framework(self) -> str: ...  # noqa: D102

    @property
    def device(self) -> str: ...  # noqa: D102

    @property
    def layout(self) -> Layout: ...  # noqa: D102

    @property
    def supports_dp_sgd(self) -> bool: ...  # noqa: D102

    def init(self, seed: int) -> np.ndarray:
        """Initial ``params_D``: equal for equal layouts and seeds, whatever the framework."""
        ...

    def with_batching(self, batching: str) -> Trainer:
        """The same trainer with ``map``, ``vmap`` or ``auto`` as the way to train a block.

        Raises:
            SettingError: it cannot be had for this model.
        """
        ...

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """How a block of so many clients, with so many examples together, would be trained."""
        ...

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients, each from its `ClientWork.start_D`, with the random numbers of its `ClientWork.round`.

        Row k of the result does not depend on the other clients.

        Returns updates with clients in the order of ``work``, ``metrics["loss"]`` (total loss and number of the
        examples seen), and without memory or extra, which `fedlearn.loop.client_update.client_step` adds.
        """
        ...

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Raw outputs ``(N, C)`` float32 of the model for ``x`` ``(N, ...)``, in evaluation mode."""
        ...
