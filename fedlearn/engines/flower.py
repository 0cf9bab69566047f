"""Train clients in Flower's simulation runtime, one message per client, to compare Flower with the other engines.

Shapes: K clients, C model outputs, D parameters.

Flower runs in a thread and starts Ray; its ServerApp only lends its `Grid` to the loop. In Ray's actors a ClientApp
builds the scenario once and trains the client of its node as the engine ``serial`` does. Request, update and client
state travel in Flower's messages, as safetensors. The engine is as slow as Flower; ``vector`` is fast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast
from uuid import uuid4

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import (
    Array,
    ClientId,
    Failure,
    FailureStage,
    MetricSum,
    Predictions,
    Request,
    State,
    Updates,
)
from fedlearn.core.serialization import Payload, pack, select_prefix, unpack, with_prefix
from fedlearn.engines.base import InProcessEngine
from fedlearn.errors import MissingExtra, is_count, is_number, require
from fedlearn.loop.base_engine import BaseEngine, engine_builder
from fedlearn.loop.protocols import Trainer
from fedlearn.protocol.training_order import pack_order, read_order
from fedlearn.trainers.base import available_cores

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
try:
    import ray  # noqa: F401
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    from fedlearn.engines.flower_simulation import Simulation, SimulationError
    from fedlearn.protocol.grid_client import from_record_dict, to_record_dict
except ImportError as missing:
    raise MissingExtra("engine=flower", "ray") from missing

Result = Updates | Predictions | Failure
MAX_CLIENTS = 10_000  # Flower polls every node ten times a second


@engine_builder(rebuilds_scenario=True)
def flower(
    data: FederatedData,
    trainer: Trainer,
    rebuild: Callable[[], Any],
    *,
    num_workers: int | None = None,
    timeout: float = 600.0,
) -> FlowerEngine:
    """Return an engine on Flower's simulation runtime with its Ray backend, one node per client.

    Args:
        data: data of the scenario.
        trainer: trainer of the scenario; only its layout is used here.
        rebuild: function that builds the same `Scenario` in each of Ray's processes; it can be pickled.
        num_workers: number of Ray actors of one core each; None takes one per core.
        timeout: seconds for the clients of a round to respond, the start of Ray included; > 0.

    *Guarantees*: the model of the engine ``serial``, bit for bit in torch. Waiting is bounded by ``timeout``.

    Raises:
        MissingExtra: Flower or Ray is not installed.
        SettingError: a setting is out of range, or there are too many clients for Flower.
        SimulationError: Flower does not start.
    """
    ok = num_workers is None or is_count(num_workers)
    require(ok, "num_workers", num_workers, "null (one a core), or a whole number >= 1", "num_workers=2")
    ok = is_number(timeout, at_least=0) and timeout > 0
    require(ok, "timeout", timeout, "seconds, > 0", "timeout=600")
    most = f"a scenario of at most {MAX_CLIENTS} clients; this has {len(data.clients)}"
    require(len(data.clients) <= MAX_CLIENTS, "engine", "flower", most, "engine=vector")
    return FlowerEngine(data, trainer, rebuild, num_workers=num_workers or available_cores(), timeout=timeout)


class FlowerEngine(BaseEngine):
    """Sends orders to the nodes of Flower's simulation; made by `flower`. Close it: Flower's threads outlive a program.

    Attributes:
        clients, layout, memories: as in every engine.
    """

    def __init__(
        self, data: FederatedData, trainer: Trainer, rebuild: Callable[[], Any], *, num_workers: int, timeout: float
    ) -> None:
        super().__init__(data.clients, trainer.layout)
        self._num_workers, self._timeout = num_workers, timeout
        self._node = _Node(_Named(rebuild), _Named(None), tuple(data.clients))
        self._simulation = Simulation(self._node.app(), len(data.clients), num_workers=num_workers, timeout_s=timeout)
        self._nodes: dict[ClientId, int] = {}

    def fit(self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Updates | Failure]:
        """Train the cohort, each client in answer to a message to its node."""
        self._set_strategy(strategy)
        requests = {client: pack_request(request, self.client_states.get(client, {})) for client in sorted(cohort)}
        for result in self._results("train", requests, stage=FailureStage.FIT):
            if isinstance(result, Updates) and result.client_state:
                own = {name: rows_KD[0] for name, rows_KD in result.client_state.items()}
                self.client_states[int(result.clients_K[0])] = own
            if isinstance(result, Updates | Failure):
                yield result

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[Predictions | Failure]:
        """Yield the outputs of the model, or of the personal model, on the held-out part of each client."""
        requests = dict.fromkeys(sorted(cohort), pack_model(params_D))
        if personal_strategy is not None:
            self._set_strategy(personal_strategy)
            requests = {client: pack_model(params_D, self.client_states.get(client, {})) for client in requests}
        for result in self._results("evaluate", requests, stage=FailureStage.EVALUATE):
            if isinstance(result, Predictions | Failure):
                yield result

    def _set_strategy(self, strategy: Strategy) -> None:
        """Send this strategy with each further message."""
        if strategy is not self._node.strategy.value:
            self._node.strategy = _Named(strategy)

    def describe(self, cohort_size: int) -> str:
        """Return how a cohort is trained, for the header."""
        number = self._num_workers
        return f"Flower's simulation, {number} Ray actor{'s' * (number != 1)}, a message a client"

    def close(self) -> None:
        """End the simulation and Ray; a second call has no effect."""
        self._simulation.close()

    def _results(self, kind: str, requests: Mapping[ClientId, bytes], *, stage: FailureStage) -> Iterator[Result]:
        """Yield the result of each client, in ascending order of clients; errors of Flower are failures."""
        if not self._nodes:
            replies = self._simulation.exchange("query", {node: RecordDict() for node in self._simulation.node_ids()})
            self._nodes = {_whose(reply): node for node, reply in replies.items()}
        contents = {self._nodes[client]: to_record_dict(request) for client, request in requests.items()}
        replies = self._simulation.exchange(kind, contents)
        for client in requests:
            reply = replies[self._nodes[client]]
            if reply.has_error():
                yield Failure(client=client, stage=stage, reason=f"{reply.error.reason}".strip())
            elif result := unpack_result(from_record_dict(reply.content), client):
                yield result


@dataclass(frozen=True)
class _Named:
    """A value with a unique name; after pickling, two values are equal if their names are."""

    value: Any = field(compare=False)
    name: str = field(default_factory=lambda: uuid4().hex)


@dataclass
class _Node:
    """The work of a node. Flower pickles it with each message, so each message has the present strategy."""

    rebuild: _Named
    strategy: _Named
    clients: Sequence[ClientId]

    def app(self) -> ClientApp:
        """Return the app that Flower calls."""
        app = ClientApp()
        app.query()(self.about)
        app.train()(self.train)
        app.evaluate()(self.evaluate)
        return app

    def about(self, message: Message, context: Context) -> Message:
        """Return the client of this node."""
        return Message(RecordDict({"about": ConfigRecord({"client": self._client(context)})}), reply_to=message)

    def train(self, message: Message, context: Context) -> Message:
        """Train the client of this node."""
        client, engine = self._client(context), _engine(self.rebuild)
        order, state = unpack_request(from_record_dict(message.content))
        engine.client_states = {client: state} if state else {}
        (result,) = engine.fit(order, _value(self.strategy), [client])
        return Message(to_record_dict(pack_result(result)), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Return predictions for the client of this node; the payload is empty if it has no held-out part."""
        client, engine = self._client(context), _engine(self.rebuild)
        params_D, state = unpack_model(from_record_dict(message.content))
        engine.client_states = {client: state} if state else {}
        personal = None if state is None else _value(self.strategy)
        results = [*engine.evaluate(params_D, [client], personal), None]
        return Message(to_record_dict(pack_result(results[0])), reply_to=message)

    def _client(self, context: Context) -> ClientId:
        return int(self.clients[int(context.node_config["partition-id"])])


@lru_cache(maxsize=1)
def _engine(rebuild: _Named) -> InProcessEngine:
    """Build the scenario once in each of Ray's processes."""
    scenario = rebuild.value()
    return InProcessEngine(scenario.data, scenario.trainer, block_size=1)


@lru_cache(maxsize=1)
def _value(named: _Named) -> Any:
    """Return the first value with this name, because compiled programs are cached by the parts of a strategy."""
    return named.value


def _whose(reply: Message) -> ClientId:
    if reply.has_error():
        raise SimulationError(f"a node of Flower's simulation cannot say who it is: {reply.error.reason}")
    return int(cast(int, reply.content["about"]["client"]))


def pack_request(request: Request, state: State) -> bytes:
    """Return a request to one client with the client's state, as bytes."""
    order = pack_order(request)
    arrays = {**order.arrays, **with_prefix("state/", state)}
    return pack(Payload(metadata={**order.metadata, "round": request.round}, arrays=arrays))


def unpack_request(data: bytes) -> tuple[Request, State]:
    """Return the request and the client's state."""
    payload = unpack(data)
    state = with_prefix("state/", select_prefix(payload.arrays, "state/"))
    order = {name: array for name, array in payload.arrays.items() if name not in state}
    request = read_order(Payload(metadata=payload.metadata, arrays=order), payload.metadata["round"])
    return request, select_prefix(payload.arrays, "state/")


def pack_model(params_D: Array, state: State | None = None) -> bytes:
    """Return parameters to evaluate as bytes; a ``state``, also an empty one, asks for the client's personal model."""
    arrays = {"params": params_D, **with_prefix("state/", state or {})}
    return pack(Payload(metadata={"is_personal": state is not None}, arrays=arrays))


def unpack_model(data: bytes) -> tuple[np.ndarray, State | None]:
    """Return the parameters, and the client's state if the request is for its personal model."""
    payload = unpack(data)
    state = select_prefix(payload.arrays, "state/")
    return payload.arrays["params"], state if payload.metadata["is_personal"] else None


def pack_result(result: Result | None) -> bytes:
    """Return the result of one client as bytes; None stands for a client without held-out examples."""
    if isinstance(result, Failure):
        metadata = {"stage": result.stage, "reason": result.reason, "traceback": result.traceback}
        return pack(Payload(metadata={"failure": metadata}))
    arrays: dict[str, Any] = {}
    if isinstance(result, Predictions):
        arrays = {"outputs": result.outputs, "targets": result.targets}
    elif result is not None:
        names = ("delta_KD", "num_examples_K", "num_steps_K", "num_bytes_K")
        arrays = {name: getattr(result, name) for name in names}
        arrays |= with_prefix("state/", result.client_state) | with_prefix("extra/", result.extra)
        arrays |= with_prefix("total/", {name: metric.total_K for name, metric in result.metrics.items()})
        arrays |= with_prefix("count/", {name: metric.count_K for name, metric in result.metrics.items()})
    return pack(Payload(metadata={}, arrays=arrays))


def unpack_result(data: bytes, client: ClientId) -> Result | None:
    """Return the result of ``client``, None if it has no held-out examples."""
    payload = unpack(data)
    if "failure" in payload.metadata:
        failure = payload.metadata["failure"]
        return Failure(client=client, **{**failure, "stage": FailureStage(failure["stage"])})
    if "outputs" in payload.arrays:
        return Predictions(client=client, **payload.arrays)
    if not payload.arrays:
        return None
    totals, counts = (select_prefix(payload.arrays, prefix) for prefix in ("total/", "count/"))
    return Updates(
        clients_K=np.array([client]),
        delta_KD=payload.arrays["delta_KD"],
        num_examples_K=payload.arrays["num_examples_K"],
        num_steps_K=payload.arrays["num_steps_K"],
        num_bytes_K=payload.arrays["num_bytes_K"],
        metrics={name: MetricSum(totals[name], counts[name]) for name in totals},
        client_state=select_prefix(payload.arrays, "state/"),
        extra=select_prefix(payload.arrays, "extra/"),
    )
