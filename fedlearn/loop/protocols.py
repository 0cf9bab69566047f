"""Protocols that the training loop, engines and trainers share.

An `Engine` sends a request to a cohort of clients and returns their updates. A `Trainer` trains the model of those
clients in one framework. `AsyncEngine` and `MixedRoundEngine` are optional capabilities of an engine.

Shapes: K clients in a block, D parameters, N examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.layout import Layout
from fedlearn.core.model_report import ModelReport
from fedlearn.core.records import (
    Array,
    ClientEvaluation,
    ClientId,
    ClientWork,
    Examples,
    Failure,
    InFlight,
    LocalSettings,
    Predictions,
    Request,
    State,
    Updates,
)


class Engine(Protocol):
    """Send a request to a cohort and return its updates, in ascending order of client ids.

    Attributes:
        clients: ids of all clients, a sequence with a length.
        layout: layout of the model.
        client_states: state that each client keeps between rounds, by client id. Checkpoints save and restore it.
        in_process: whether the clients train in this process on the data that were passed to the builder, and `fit`
            yields `Updates`, not partial aggregates. Poisoning, root datasets and audits need such an engine.
        deployed: True for real clients, whose noise must not follow from the seed of the run.
        elapsed_s: virtual seconds of the last `fit`; None without a virtual clock.
        mixed_block_size: maximum number of clients that train together although their requests come from different
            rounds; 1 for an engine that cannot do this.

    `fedlearn.loop.base_engine.BaseEngine` has defaults for the optional members.
    """

    client_states: dict[ClientId, State]

    @property
    def clients(self) -> Sequence[ClientId]: ...  # noqa: D102

    @property
    def layout(self) -> Layout: ...  # noqa: D102

    @property
    def in_process(self) -> bool: ...  # noqa: D102

    @property
    def deployed(self) -> bool: ...  # noqa: D102

    @property
    def elapsed_s(self) -> float | None: ...  # noqa: D102

    @property
    def mixed_block_size(self) -> int: ...  # noqa: D102

    def fit(
        self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]
    ) -> Iterator[Updates | PartialAggregate | Failure]:
        """Train the cohort.

        An engine may yield partial aggregates where the aggregator can merge them; see
        `fedlearn.algorithm.aggregation.accumulate`.
        """
        ...

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[Predictions | ClientEvaluation | Failure]:
        """Yield predictions on the held-out data of each client, or metric sums that the client computed.

        Args:
            params_D: the global model.
            cohort: ids of the clients.
            personal_strategy: strategy with personal parameters. Each client then evaluates its personal model: its
                personal parameters, completed by ``params_D``.
        """
        ...

    def describe(self, cohort_size: int) -> str:
        """Return how a cohort of this size is trained, for the header."""
        ...

    def close(self) -> None:
        """Release all workers and connections."""
        ...


class Completion(NamedTuple):
    """Report the completion of a request in flight.

    Attributes:
        request_index: position of the request among those passed to `AsyncEngine.wait_for_next`.
        result: the update of the client, or its failure.
        clock: time of the completion, in seconds since the run began.
    """

    request_index: int
    result: Updates | Failure
    clock: float


@runtime_checkable
class AsyncEngine(Protocol):
    """Extend `Engine` for asynchronous strategies."""

    def wait_for_next(self, strategy: Strategy, in_flight: Sequence[InFlight], clock: float) -> Completion:
        """Wait until one of these requests, each to one client, completes.

        Requests that were not passed before are sent. Requests that were passed before and are missing now are
        abandoned. The arguments hold all state, so a resumed run has the same requests in flight.
        """
        ...


@runtime_checkable
class MixedRoundEngine(Protocol):
    """Extend `Engine` to train clients as one block although their requests come from different rounds.

    `Engine.mixed_block_size` is the maximum number of clients in such a block.
    """

    def fit_mixed_rounds(self, strategy: Strategy, block: Sequence[InFlight]) -> Iterator[Updates | Failure]:
        """Train one block in which each client occurs once.

        The local rule must satisfy `LocalRule.supports_mixed_rounds`.
        """
        ...


class Trainer(Protocol):
    """Train and evaluate one model in one framework; no other part of the library knows a framework.

    Attributes:
        framework: ``torch``, ``jax`` or ``numpy``, for the header.
        device: device that computes, e.g. ``cpu``.
        layout: layout of the trainable parameters and of the buffers (batch statistics) of the model.
        supports_dp_sgd: whether the trainer has DP-SGD, for requests with ``local.example_dp``.
        supports_process_pool: whether forked processes may train with this trainer, see ``batching=process_pool``.
        clients_per_step: number of clients of a block whose steps share work, so that smaller blocks take longer.
        rule_hooks: names of the functions of a local rule that the trainer applies, of
            `fedlearn.algorithm.local_rule.HOOKS`. Rules with other functions are refused.
        initialization: one phrase on the source of the initial parameters, for the header: drawn from the seed, or
            kept as the user gave them.

    A trainer on another device than a CPU may have ``device_memory``, the memory of the device in bytes. It bounds the
    size of a block.
    """

    @property
    def framework(self) -> str: ...  # noqa: D102

    @property
    def device(self) -> str: ...  # noqa: D102

    @property
    def layout(self) -> Layout: ...  # noqa: D102

    @property
    def supports_dp_sgd(self) -> bool: ...  # noqa: D102

    @property
    def supports_process_pool(self) -> bool: ...  # noqa: D102

    @property
    def clients_per_step(self) -> int: ...  # noqa: D102

    @property
    def rule_hooks(self) -> frozenset[str]: ...  # noqa: D102

    @property
    def initialization(self) -> str: ...  # noqa: D102

    def init(self, seed: int) -> np.ndarray:
        """Return initial ``params_D``; equal layouts and seeds give equal parameters in every framework."""
        ...

    def with_batching(self, batching: str) -> Trainer:
        """Return this trainer with another way to train a block: ``map``, ``vmap`` or ``auto``.

        Raises:
            SettingError: the model does not support it.
        """
        ...

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """Return how a block with this many clients and examples would be trained."""
        ...

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients, each from its `ClientWork.start_D`, with the random numbers of its `ClientWork.round`.

        Returns:
            Updates with clients in the order of ``work``, and ``metrics["loss"]``: total loss and number of the
            examples that were used. Client state and extra values are added by
            `fedlearn.loop.client_update.client_step`.

        Guarantees:
            Row k of the result does not depend on the other clients.
        """
        ...

    def check_local(self, local: LocalSettings) -> None:
        """Check before the first round that the trainer has the optimizer and the other settings of local training.

        Raises:
            SettingError: The trainer does not have a setting, or it does not fit the task.
        """
        ...

    def check_model(self, examples: Examples, *, synthetic: bool = False) -> ModelReport:
        """Check the model and its loss on a few examples before training.

        Args:
            examples: examples of a client, at least one.
            synthetic: whether the result must not depend on the values of the examples. Real clients need this.

        Raises:
            SettingError: The model or its loss does not fit the examples. The error names the wrong argument.
        """
        ...

    def check_example_dp(self, request: Request, examples: Examples) -> None:
        """Check before the first round that DP-SGD protects single examples with this model.

        Args:
            request: training order with ``local.example_dp``, and parameters of the model.
            examples: examples of a client, at least one.

        Raises:
            SettingError: The gradient of an example depends on other examples, or a forward pass changes the model.
        """
        ...

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Return raw outputs ``(N, C)`` float32 of the model for ``x`` ``(N, ...)``, in evaluation mode."""
        ...

    def close(self) -> None:
        """Release processes and memory; a closed trainer may be used again."""
        ...
