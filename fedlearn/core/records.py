"""Records that the training loop, engines and clients exchange. All records are frozen and need NumPy only.

Shapes: K clients in a block, D parameters, N examples, C model outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

from fedlearn.core.gradient_settings import as_class_weights, check_gradient_settings
from fedlearn.core.inputs import join_inputs
from fedlearn.core.named_option import as_option, option_name, option_values
from fedlearn.core.optimizers import check_optimizer, check_state_policy
from fedlearn.core.privacy_ledger import Epsilon, Ledger
from fedlearn.core.schedules import check_schedule
from fedlearn.errors import is_count, is_number, require

Array = Any  # any array of the array API standard: NumPy, torch, JAX
ClientId = int  # index in the partition; it does not change when a node reconnects
State = Mapping[str, Any]  # named arrays that persist between rounds

EMPTY_STATE: State = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleDP:
    """Settings of DP-SGD, example-level differential privacy in local training.

    Args:
        clip: L2 bound on the gradient of each example, > 0.
        noise_multiplier: standard deviation of the noise on the sum of clipped gradients divided by ``clip``, >= 0.

    Reference: Abadi et al., *Deep Learning with Differential Privacy*, CCS 2016, arXiv:1607.00133.
    """

    clip: float = 1.0
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        positive = is_number(self.clip, at_least=0) and 0 < self.clip < float("inf")
        require(positive, "clip", self.clip, "a finite number > 0", "clip=1.0")
        noise = self.noise_multiplier
        finite = is_number(noise, at_least=0) and noise < float("inf")
        require(finite, "noise_multiplier", noise, "a finite number >= 0", "noise_multiplier=1.0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSettings:
    """Settings of local training: optimizer, learning rates, bounds on gradients, and changes of the loss.

    Args:
        epochs: passes over the examples of the client, >= 1; 1 if ``steps`` is set.
        steps: number of local steps instead of epochs, >= 1; each pass reshuffles the examples. None to use ``epochs``.
        batch_size: examples per step, >= 1; the last batch of a pass may be smaller.
        micro_batch_size: examples per forward pass, >= 1. A step then adds the gradients of several passes, and needs
            less memory. None: the whole batch.
        optimizer: ``sgd``, ``adam``, ``adamw``, ``adagrad`` or ``rmsprop`` (equal in all frameworks), another name in
            torch.optim or optax, or a mapping of a name and values, e.g. ``{"name": "adam", "betas": [0.9, 0.99]}``.
            Or a function: ``(parameters, lr=...) -> torch.optim.Optimizer`` or ``(learning_rate) -> optax optimizer``.
        optimizer_state: ``reset`` gives a client a new optimizer state in each round. ``keep`` continues with the state
            of its last round, which stays at the client. ``average`` continues with the mean of the states that the
            clients of the last round sent to the server.
        learning_rate: learning rate of the optimizer, >= 0.
        schedule: changes the learning rate: ``constant``, ``linear``, ``cosine``, ``exponential`` or ``step``, or a
            mapping of a name and values; see `fedlearn.core.schedules`. Or a function ``(round, step, num_steps) ->
            factor``.
        momentum: momentum of ``sgd``, in [0, 1).
        weight_decay: weight decay, >= 0; decoupled for ``adamw``, an L2 term for the others (as in torch.optim).
        max_grad_norm: L2 bound on the gradient of each step, > 0, before the local rule and the optimizer. None: no
            bound.
        class_weights: factor of the loss of each class, ``(C,)``, >= 0. ``balanced`` computes it at each client from
            its training examples: ``n / (c * n_y)``, with ``n`` examples, ``c`` classes and ``n_y`` examples of class
            ``y``. None: no factor.
        label_smoothing: share of the target that all classes divide equally, in [0, 1).
        precision: ``float32``, or ``bfloat16`` for forward and backward passes of training in mixed precision. The
            parameters, the loss, the optimizer and evaluation stay in float32.
        example_dp: settings of DP-SGD, or None. With DP-SGD, batches are Poisson samples with ``batch_size`` expected
            examples.

    Raises:
        SettingError: A value is out of range, or both ``epochs`` and ``steps`` are set.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    optimizer: Any = "sgd"
    optimizer_state: str = "reset"
    learning_rate: float = 0.1
    schedule: Any = "constant"
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    class_weights: Any = None
    label_smoothing: float = 0.0
    precision: str = "float32"
    example_dp: ExampleDP | None = None

    def __post_init__(self) -> None:
        require(is_count(self.epochs), "epochs", self.epochs, "a whole number >= 1", "epochs=1")
        require(self.steps is None or is_count(self.steps), "steps", self.steps, "null, or >= 1", "steps=100")
        is_unique = self.steps is None or self.epochs == 1
        require(is_unique, "epochs", self.epochs, f"1, because steps={self.steps} is set", "epochs=1")
        require(is_count(self.batch_size), "batch_size", self.batch_size, "a whole number >= 1", "batch_size=32")
        learns = is_number(self.learning_rate, at_least=0)
        require(learns, "learning_rate", self.learning_rate, "a number >= 0", "learning_rate=0.1")
        require(is_number(self.momentum, at_least=0, below=1), "momentum", self.momentum, "in [0, 1)", "momentum=0.9")
        decays = is_number(self.weight_decay, at_least=0)
        require(decays, "weight_decay", self.weight_decay, "a number >= 0", "weight_decay=0.0001")
        object.__setattr__(self, "optimizer", as_option(self.optimizer, "optimizer", "adam"))
        check_optimizer(self.optimizer, momentum=self.momentum)
        object.__setattr__(self, "schedule", as_option(self.schedule, "schedule", "cosine"))
        check_schedule(self.schedule)
        object.__setattr__(self, "class_weights", as_class_weights(self.class_weights))
        check_gradient_settings(self)
        check_state_policy(self)

    @property
    def changes_loss(self) -> bool:
        """True if the training loss differs from the loss of the task."""
        return self.class_weights is not None or self.label_smoothing > 0

    @property
    def rate_is_constant(self) -> bool:
        """True if the learning rate is constant within a round."""
        return option_name(self.schedule) is not None and option_values(self.schedule).get("over") != "steps"

    def num_steps(self, num_examples: Any) -> Any:
        """Return the number of local steps per round of a client with ``num_examples`` examples.

        Args:
            num_examples: number of examples; an integer, or an integer array for several clients.
        """
        return self.steps + 0 * num_examples if self.steps else self.epochs * -(-num_examples // self.batch_size)


@dataclass(frozen=True, slots=True)
class Examples:
    """Labelled examples: inputs and targets.

    Attributes:
        x: inputs, ``(N, ...)``, float32; images are N x height x width x channels. Several inputs of a model are one
            structured array; a mapping or a tuple of arrays is turned into it, see `fedlearn.core.inputs`.
        y: targets, ``(N,)``; int64 classes, or float32 values for regression.

    Raises:
        ValueError: ``x`` and ``y`` have different lengths.
    """

    x: np.ndarray
    y: np.ndarray

    def __post_init__(self) -> None:
        if type(self.x) is not np.ndarray and isinstance(self.x, Mapping | tuple):  # the first test is fast
            object.__setattr__(self, "x", join_inputs(self.x))
        if len(self.x) != len(self.y):
            raise ValueError(f"x has {len(self.x)} examples, but y has {len(self.y)}")

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Request to a cohort to train the global model. It contains no code.

    Attributes:
        round: round number, >= 1.
        seed: seed of the run; clients derive their batches from it.
        params_D: global model.
        broadcast: further arrays for the clients, by name, e.g. SCAFFOLD's server control variate. Values from the
            server half of a stage to its client half are named like ``stage/0/name``.
        local: settings of local training.
        deployed: True in a deployment; noise then comes from the operating system's entropy, not from the seed.
        clock: time of the request in seconds since the start of the run; 0 without a clock.
        client_models: the model ``(D,)`` of each client of the cohort, if clients receive different models in place of
            ``params_D``; else empty.
    """

    round: int
    seed: int
    params_D: Array
    broadcast: Mapping[str, Array] = field(default_factory=dict)
    local: LocalSettings = field(default_factory=LocalSettings)
    deployed: bool = False
    clock: float = 0.0
    client_models: Mapping[ClientId, Array] = field(default_factory=dict)

    def for_client(self, client: ClientId) -> Request:
        """Return the request that one client receives, with its model as ``params_D``."""
        if not self.client_models:
            return self
        return replace(self, params_D=self.client_models[client], client_models={})

    def for_clients(self, clients: Sequence[ClientId]) -> Request:
        """Return the request without the models of all other clients."""
        if not self.client_models:
            return self
        return replace(self, client_models={client: self.client_models[client] for client in clients})


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """Request to a client of an asynchronous strategy, before its response."""

    client: ClientId
    request: Request


class ClientWork(NamedTuple):
    """Part of a request for one client.

    Attributes:
        client: id of the client.
        examples: training examples of the client.
        client_state: client state from earlier rounds, by name.
        start_D: initial parameters of local training; None for ``params_D`` of the request.
        round: round number for the random streams of the client; None for the round of the request.
    """

    client: ClientId
    examples: Examples
    client_state: State = EMPTY_STATE
    start_D: Array | None = None
    round: int | None = None


@dataclass(frozen=True, slots=True)
class MetricSum:
    """Metric as totals and counts of K clients, so that sums over clients and blocks are possible."""

    total_K: np.ndarray
    count_K: np.ndarray

    def client_means(self) -> np.ndarray:
        """Return the mean of each client, ``(K,)``; NaN if its count is 0."""
        count_K = np.asarray(self.count_K, np.float64)
        return np.divide(self.total_K, count_K, out=np.full(len(count_K), np.nan), where=count_K > 0)

    @property
    def mean(self) -> float:
        """Mean over all clients, weighted by their counts; NaN if all counts are 0."""
        count = float(np.sum(self.count_K))
        return float(np.sum(self.total_K)) / count if count else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Updates:
    """Updates of K clients.

    Attributes:
        clients_K: client ids.
        delta_KD: parameters after local training minus parameters before it. Updates for the server contain only the
            shared parameters (`Strategy.shared_layout`).
        num_examples_K: training examples of each client.
        num_steps_K: local steps of each client.
        metrics: training metrics as sums, e.g. ``loss`` over the examples of all steps.
        client_state: new client states by name, ``(K, D)`` or smaller; they stay with the engine.
        extra: further vectors for the server by name, ``(K, D)``, e.g. SCAFFOLD's control change.
        num_bytes_K: bytes that each client sends; empty if they were not counted.
        payloads: encoded update of each client, if the strategy has a codec; ``delta_KD`` contains the decoded updates.
    """

    clients_K: np.ndarray
    delta_KD: Array
    num_examples_K: np.ndarray
    num_steps_K: np.ndarray
    metrics: Mapping[str, MetricSum] = field(default_factory=dict)
    client_state: Mapping[str, Array] = field(default_factory=dict)
    extra: Mapping[str, Array] = field(default_factory=dict)
    num_bytes_K: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    payloads: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(self.clients_K)

    def rows(self, keep: np.ndarray) -> Updates:
        """Return the updates of some clients.

        Args:
            keep: boolean mask ``(K,)``, or row numbers.
        """
        return replace(
            self,
            clients_K=self.clients_K[keep],
            delta_KD=self.delta_KD[keep],
            num_examples_K=self.num_examples_K[keep],
            num_steps_K=self.num_steps_K[keep],
            metrics={name: MetricSum(s.total_K[keep], s.count_K[keep]) for name, s in self.metrics.items()},
            client_state={name: rows_KD[keep] for name, rows_KD in self.client_state.items()},
            extra={name: rows_KD[keep] for name, rows_KD in self.extra.items()},
            num_bytes_K=self.num_bytes_K[keep] if len(self.num_bytes_K) else self.num_bytes_K,
            payloads=tuple(self.payloads[k] for k in np.arange(len(self))[keep]) if self.payloads else (),
        )


class FailureStage(StrEnum):
    """Stage at which a client failed. ``metrics.jsonl`` contains these values.

    A node may name only the stages for which ``may_be_named_by_node`` is True; any other name counts as ``node``.
    """

    DATA = "data"  # the client has no usable examples
    FIT = "fit"  # local training raised an error
    UPDATE = "update"  # the update is not finite, or has a wrong shape
    EVALUATE = "evaluate"  # the held-out part could not be evaluated
    NODE = "node"  # not connected, dropped out, or missed the deadline
    RESPONSE = "response"  # the response of the node cannot be read
    REQUEST = "request"  # the node cannot read the request
    POLICY = "policy"  # the policy of the node refuses the request
    CLIENT_STATE = "client_state"  # the state of the client is lost or does not fit
    NOT_NEEDED = "not_needed"  # the round closed without this client
    SECAGG_ADVERTISE = "secagg.advertise"  # stages of secure aggregation, Bonawitz et al. 2017
    SECAGG_SHARE = "secagg.share"
    SECAGG_MASK = "secagg.mask"
    SECAGG_CONFIRM = "secagg.confirm"
    SECAGG_OPEN = "secagg.open"

    @property
    def counts_as_failure(self) -> bool:
        """True if the stage counts towards ``max_failures``."""
        return self is not FailureStage.NOT_NEEDED

    @property
    def is_before_sending(self) -> bool:
        """True if the client failed before it sent an update, so nothing was released.

        A node that names a stage sends no update of this client. At the first two stages of secure aggregation,
        clients exchange keys only.
        """
        keys = (FailureStage.SECAGG_ADVERTISE, FailureStage.SECAGG_SHARE)
        return self.may_be_named_by_node or self in keys

    @property
    def may_be_named_by_node(self) -> bool:
        """True if a coordinator accepts this stage from a node."""
        return self in (
            FailureStage.DATA,
            FailureStage.FIT,
            FailureStage.UPDATE,
            FailureStage.CLIENT_STATE,
            FailureStage.POLICY,
            FailureStage.REQUEST,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Failure of a client to send an update or an evaluation.

    Attributes:
        client: id of the client.
        stage: stage of the failure, or its value as a string.
        reason: reason in one sentence.
        traceback: traceback of the error; empty for a client on another machine.
        is_delivered: False if the request did not reach the client, so nothing was released.

    Raises:
        ValueError: ``stage`` is not a `FailureStage`.
    """

    client: ClientId
    stage: FailureStage
    reason: str
    traceback: str = ""
    is_delivered: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage", FailureStage(self.stage))

    @property
    def may_have_released(self) -> bool:
        """True if the client may have sent an update that did not arrive."""
        return self.is_delivered and not self.stage.is_before_sending


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Outputs of a model on the held-out part of one client.

    Attributes:
        client: id of the client.
        outputs: raw outputs, ``(N, C)``; logits, or values for regression.
        targets: targets, ``(N,)``.
    """

    client: ClientId
    outputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientEvaluation:
    """Metrics of one client, without its outputs and targets.

    Attributes:
        client: id of the client.
        num_examples: number of held-out examples.
        metrics: metric -> value on the held-out part of the client; NaN if it is undefined.
        sums: values that are added over clients, e.g. ``loss`` (total) and ``confusion`` (C x C counts); see
            `fedlearn.core.metrics.evaluate_client`.
    """

    client: ClientId
    num_examples: int
    metrics: Mapping[str, float]
    sums: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Metrics of the global model, or of the models with personal parameters, on held-out examples.

    Attributes:
        pooled: metric -> value on the held-out examples of all clients together.
        clients: evaluated clients, in ascending order.
        num_examples_K: number of held-out examples of each client.
        per_client: metric -> values on the held-out parts of the clients, ``(K,)``; NaN if undefined, e.g. AUC with one
            class.
        personal: evaluation of the clients' personal models on their own held-out parts; None without personal models.
        confusion_CC: counts (targets x predictions) on the pooled examples; None unless the task is a classification
            and all outputs are finite.
        lower_is_better: names of the metrics whose low values are good.
        held_out: evaluation of the global model at clients that never train; None without such clients.
    """

    pooled: Mapping[str, float]
    clients: tuple[ClientId, ...]
    num_examples_K: np.ndarray
    per_client: Mapping[str, np.ndarray]
    personal: Evaluation | None = None
    confusion_CC: np.ndarray | None = None
    lower_is_better: tuple[str, ...] = ()
    held_out: Evaluation | None = None

    def mean(self, metric: str) -> float:
        """Return the mean over the clients with a defined metric, with equal weights."""
        return _over_defined(np.mean, self.per_client[metric])

    def std(self, metric: str) -> float:
        """Return the standard deviation over the clients with a defined metric."""
        return _over_defined(np.std, self.per_client[metric])

    def worst(self, metric: str, *, higher_is_better: bool, share: float = 0.1) -> float:
        """Return the mean over the clients with the worst values.

        Args:
            metric: name of the metric.
            higher_is_better: True if high values are good.
            share: share of the clients with a defined metric, in (0, 1]; at least one client is used.
        """
        values_K = np.asarray(self.per_client[metric], np.float64)
        ascending_K = np.sort(values_K[~np.isnan(values_K)])
        num_worst = max(1, int(np.ceil(share * len(ascending_K))))
        return _over_defined(np.mean, ascending_K[:num_worst] if higher_is_better else ascending_K[-num_worst:])


def _over_defined(summary: Any, values_K: np.ndarray) -> float:
    defined = np.asarray(values_K, np.float64)
    defined = defined[~np.isnan(defined)]
    return float(summary(defined)) if len(defined) else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerState:
    """Complete state of the server after ``round`` rounds. A checkpoint contains it and the client states.

    Attributes:
        round: number of completed rounds, >= 0.
        seed: seed of the run.
        params_D: global model.
        server: state of the server optimizer.
        stages: state of the server half of each stage.
        aggregate: state of the aggregation rule.
        select: state of the client selection.
        ledger: privacy ledger of the run.
        clock: time in seconds since the start of the run; 0 without a clock.
        in_flight: in-flight requests of an asynchronous strategy, each with the model that was sent.
    """

    round: int
    seed: int
    params_D: Array
    server: State = field(default_factory=dict)
    stages: tuple[State, ...] = ()
    aggregate: State = field(default_factory=dict)
    select: State = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    clock: float = 0.0
    in_flight: tuple[InFlight, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Result of one round. The training loop yields it, and callbacks consume it.

    Attributes:
        state: server state after the round.
        cohort: selected clients, ascending. For an asynchronous strategy: clients whose requests ended since the step
            before, by a response or a failure; a client may be listed twice.
        failures: failures of clients in this round.
        metrics: training metrics, pooled over the responding clients.
        evaluation: evaluation after the round; None in rounds without evaluation.
        num_examples: training examples of the responding clients; None if the privacy mechanism withholds them.
        privacy: epsilon of all rounds so far; None without a privacy mechanism.
        bytes_up: payload from the clients, in bytes.
        bytes_down: payload to the clients, in bytes.
        seconds: wall time of the round in seconds, including the evaluation.
        clock: time in seconds since the start of the run, without evaluations, on the virtual clock of a system model
            (`fedlearn.loop.system_model`). For asynchronous strategies with real clients it is wall time. None without
            a clock.
    """

    state: ServerState
    cohort: tuple[ClientId, ...]
    failures: tuple[Failure, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    num_examples: int | None = 0
    privacy: Epsilon | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    clock: float | None = None

    @property
    def number(self) -> int:
        """Round number, starting from 1."""
        return self.state.round

    @property
    def num_updates(self) -> int:
        """Number of clients that sent an update."""
        return len(self.cohort) - len(
            {failure.client for failure in self.failures if failure.stage != FailureStage.EVALUATE}
        )


def sorted_client_ids(clients: Sequence[ClientId]) -> tuple[ClientId, ...]:
    """Return client ids as Python integers, in ascending order."""
    return tuple(sorted(int(client) for client in clients))
