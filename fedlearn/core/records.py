"""What travels between loop, engine and clients. Everything here is frozen and knows NumPy only.

Shapes: K clients in a block, D parameters laid flat, N examples, S local steps, B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

from fedlearn.core.privacy_ledger import Epsilon, Ledger
from fedlearn.errors import is_count, is_number, require

Array = Any  # any array of the array API standard: NumPy, torch, JAX
ClientId = int  # stable: a partition number, never a connection
State = Mapping[str, Any]  # named arrays that outlive a round

EMPTY_STATE: State = {}
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleDP:
    """Set example-level differential privacy of local training: DP-SGD (Abadi et al., CCS 2016, arXiv:1607.00133).

    Args:
        clip: L2 bound on each example's gradient, > 0.
        noise_multiplier: standard deviation of the noise on the sum of clipped gradients, divided by ``clip``; >= 0.
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
    """Set local training: minibatch SGD or AdamW from the global model, with a new optimizer state in each round.

    Args:
        epochs: passes over the client's examples, >= 1; 1 when ``steps`` is given instead.
        steps: local steps instead of epochs, >= 1; the client's examples are reshuffled at each pass.
        batch_size: examples a step, >= 1; the last batch of a pass may be smaller.
        optimizer: ``sgd`` or ``adamw``.
        learning_rate: >= 0.
        momentum: in [0, 1), for ``sgd``.
        weight_decay: >= 0; an L2 term for ``sgd``, decoupled for ``adamw`` (as in torch.optim).
        example_dp: train with DP-SGD; batches are then Poisson samples of ``batch_size`` expected examples.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    example_dp: ExampleDP | None = None

    def __post_init__(self) -> None:
        require(is_count(self.epochs), "epochs", self.epochs, "a whole number >= 1", "epochs=1")
        require(self.steps is None or is_count(self.steps), "steps", self.steps, "null, or >= 1", "steps=100")
        either = self.steps is None or self.epochs == 1
        require(
            either, "epochs", self.epochs, f"1, as it is not used beside steps={self.steps}", "epochs=1, or steps=null"
        )
        require(is_count(self.batch_size), "batch_size", self.batch_size, "a whole number >= 1", "batch_size=32")
        known = self.optimizer in OPTIMIZERS
        require(known, "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}", "optimizer=sgd")
        learns = is_number(self.learning_rate, at_least=0)
        require(learns, "learning_rate", self.learning_rate, "a number >= 0", "learning_rate=0.1")
        require(is_number(self.momentum, at_least=0, below=1), "momentum", self.momentum, "in [0, 1)", "momentum=0.9")
        decays = is_number(self.weight_decay, at_least=0)
        require(decays, "weight_decay", self.weight_decay, "a number >= 0", "weight_decay=0.0001")

    def num_steps(self, num_examples: Any) -> Any:
        """Local steps that a client with so many examples takes in a round; of many clients for an array."""
        return self.steps + 0 * num_examples if self.steps else self.epochs * -(-num_examples // self.batch_size)


@dataclass(frozen=True, slots=True)
class Examples:
    """Hold labelled examples: inputs and targets.

    ``x`` is ``(N, ...)`` float32 (images are N x height x width x channels); ``y`` is ``(N,)``: int64 class numbers, or
    float32 targets for regression.
    """

    x: np.ndarray
    y: np.ndarray

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"x holds {len(self.x)} examples but y holds {len(self.y)}")

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Describe a request to a cohort. It carries no code.

    Attributes:
        round: from 1.
        seed: of the run; clients derive their batches from it.
        params_D: the global model.
        broadcast: further D-vectors for the clients, e.g. SCAFFOLD's server control variate, and what server halves of
            stages send to their client halves, as ``stage/0/name``.
        local: how to train.
        deployed: whether clients are real, so that noise must come from the operating system's entropy, not the seed.
        clock: when it is given, in seconds since the run began, where there is a clock.
    """

    round: int
    seed: int
    params_D: Array
    broadcast: Mapping[str, Array] = field(default_factory=dict)
    local: LocalSettings = field(default_factory=LocalSettings)
    deployed: bool = False
    clock: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """Hold a request that a client still works on, in an asynchronous strategy."""

    client: ClientId
    request: Request


class ClientWork(NamedTuple):
    """Hold the part of a request that concerns one client.

    Attributes:
        client: who.
        examples: its own.
        client_state: what it has kept for itself, by name.
        start_D: where its training begins; None: at the order's ``params_D``.
        round: from which its random numbers follow; None: the order's, as where all clients of a block have the same.
    """

    client: ClientId
    examples: Examples
    client_state: State = EMPTY_STATE
    start_D: Array | None = None
    round: int | None = None


@dataclass(frozen=True, slots=True)
class MetricSum:
    """Hold a metric as totals and counts over K clients, so that it adds across clients and blocks."""

    total_K: np.ndarray
    count_K: np.ndarray

    def client_means(self) -> np.ndarray:
        """Of each client, NaN where nothing was counted."""
        count_K = np.asarray(self.count_K, np.float64)
        return np.divide(self.total_K, count_K, out=np.full(len(count_K), np.nan), where=count_K > 0)

    @property
    def mean(self) -> float:
        """Over everything counted, NaN if nothing was."""
        count = float(np.sum(self.count_K))
        return float(np.sum(self.total_K)) / count if count else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Updates:
    """Hold the updates of K clients.

    Attributes:
        clients_K: client ids.
        delta_KD: where local training ended minus where it began; on its way to the server without the parameters
            that stay at the clients, K x fewer (`Strategy.shared_layout`).
        num_examples_K: training examples of each client.
        num_steps_K: local steps that each took.
        metrics: sums, e.g. ``loss`` over the examples seen while training.
        client_state: what each client keeps for itself, K x D or fewer; stays with the engine.
        extra: what else it sends, K x D, e.g. SCAFFOLD's control change.
        num_bytes_K: bytes that each client sends.
        payloads: each client's update as it is sent, where a codec writes it; what it reads as is ``delta_KD``.
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
        """The updates of some of the clients, chosen by a mask or by row numbers."""
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
    """Name the stage at which a client failed. The values are those of ``metrics.jsonl``.

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
        """Whether the stage counts against ``max_failures``."""
        return self is not FailureStage.NOT_NEEDED

    @property
    def is_before_sending(self) -> bool:
        """Whether the client failed before anything was sent, so that its data were not released."""
        return self in (FailureStage.DATA, FailureStage.FIT, FailureStage.UPDATE)

    @property
    def may_be_named_by_node(self) -> bool:
        """Whether a coordinator accepts this stage from a node."""
        return self.is_before_sending or self in (
            FailureStage.CLIENT_STATE,
            FailureStage.POLICY,
            FailureStage.REQUEST,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Record a client that delivered no update or no evaluation.

    Attributes:
        client: id of the client.
        stage: stage at which it failed; its value as a string is accepted.
        reason: reason, one sentence.
        traceback: traceback of the error; empty for a client on another machine.

    Raises:
        ValueError: ``stage`` is not a `FailureStage`.
    """

    client: ClientId
    stage: FailureStage
    reason: str
    traceback: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage", FailureStage(self.stage))


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Hold raw outputs ``(N, C)`` of a model (logits, or values for regression) on the held-out part of one client."""

    client: ClientId
    outputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientEvaluation:
    """Hold the metrics of one client that keeps outputs and targets to itself.

    Attributes:
        client: who.
        num_examples: held-out examples.
        metrics: metric -> value on its own part; NaN where it is undefined.
        sums: what adds across clients, e.g. ``loss`` (total) and ``confusion`` (C x C counts), see
            `fedlearn.core.metrics.evaluate_client`.
    """

    client: ClientId
    num_examples: int
    metrics: Mapping[str, float]
    sums: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Hold the metrics on held-out examples: of the global model, or of the models with personal parameters.

    Attributes:
        pooled: metric -> value on the examples of all clients together.
        clients: the clients evaluated, in ascending order.
        num_examples_K: held-out examples of each.
        per_client: metric -> value on each client's own part (K); NaN where it is undefined (AUC with one class).
        personal: what the models are worth that clients keep beside the global one, each on its client's own part;
            None where there are none.
    """

    pooled: Mapping[str, float]
    clients: tuple[ClientId, ...]
    num_examples_K: np.ndarray
    per_client: Mapping[str, np.ndarray]
    personal: Evaluation | None = None

    def mean(self, metric: str) -> float:
        """Over the clients where the metric is defined, each counted once."""
        return _over_defined(np.mean, self.per_client[metric])

    def std(self, metric: str) -> float:
        """Standard deviation over those clients."""
        return _over_defined(np.std, self.per_client[metric])

    def worst(self, metric: str, *, higher_is_better: bool, share: float = 0.1) -> float:
        """Mean over the worst ``share`` of those clients (at least one)."""
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
    """Hold the whole state of the server after ``round`` rounds. With the client states it makes a checkpoint.

    ``clock`` is the time in seconds since the run began, where there is a clock. ``in_flight`` are the requests in
    flight of an asynchronous strategy, each with the model that was sent.
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
    """Hold the result of one round. The training loop yields one per round; callbacks consume it.

    Attributes:
        state: after the round.
        cohort: clients chosen, ascending; of an asynchronous strategy those that answered, or are given up, since the
            step before, and one may be there twice.
        failures: those that did not deliver.
        metrics: training metrics, pooled over the clients that delivered.
        evaluation: after the round, or None in rounds that do not evaluate.
        num_examples: training examples at the clients that delivered; None where the protection withholds it.
        privacy: epsilon of all rounds so far; None without protection.
        bytes_up, bytes_down: payload sent by clients, and to them.
        seconds: wall time of the round, evaluation included.
        clock: seconds since the run began, without evaluation, on the virtual clock of a system model
            (`fedlearn.loop.system_model`). For asynchronous strategies with real clients: wall time. None: no clock.
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
        """From 1."""
        return self.state.round

    @property
    def num_updates(self) -> int:
        """Clients that delivered."""
        return len(self.cohort) - len(
            {failure.client for failure in self.failures if failure.stage != FailureStage.EVALUATE}
        )


def sorted_client_ids(clients: Sequence[ClientId]) -> tuple[ClientId, ...]:
    """Client ids as plain ints, ascending."""
    return tuple(sorted(int(client) for client in clients))
