"""Train clients in Flower's simulation runtime, one message per client, to compare Flower with the other engines.

Shapes: K clients, C model outputs, D parameters.

Flower runs in a thread and starts Ray. Its ServerApp only provides its `Grid` to the loop. In Ray's actors a ClientApp
builds the scenario once and trains the client of its node, as the engine ``serial`` does. Flower's messages contain the
request, the update and the client state as safetensors. The engine is as slow as Flower; ``vector`` is faster.
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
from fedlearn.core.threads import available_cores
from fedlearn.engines.base import InProcessEngine
from fedlearn.errors import MissingExtra, is_count, is_number, require
from fedlearn.loop.base_engine import BaseEngine, engine_builder
from fedlearn.loop.protocols import Trainer
from fedlearn.protocol.training_order import pack_order, read_order

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
MAX_CLIENTS = 10_000  # clients, because Flower polls each node ten times per second


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
        rebuild: picklable function that builds the same `Scenario` in each of Ray's processes.
        num_workers: number of Ray actors of one core each, >= 1; None: one per core.
        timeout: seconds for the clients of a round to respond, the start of Ray included, > 0, default 600.

    Guarantees:
        The model is equal to the model of the engine ``serial``, in torch bit for bit. ``timeout`` limits each wait.

    Raises:
        MissingExtra: Flower or Ray is not installed.
        SettingError: A setting is out of range, or the scenario has too many clients for Flower.
        SimulationError: Flower does not start.
    """
    is_valid = num_workers is None or is_count(num_workers)
    require(is_valid, "num_workers", num_workers, "null (one per core), or a whole number >= 1", "num_workers=2")
    is_valid = is_number(timeout, at_least=0) and timeout > 0
    require(is_valid, "timeout", timeout, "a number of seconds > 0", "timeout=600")
    expected = f"another engine for {len(data.clients)} clients; engine=flower supports at most {MAX_CLIENTS}"
    require(len(data.clients) <= MAX_CLIENTS, "engine", "flower", expected, "engine=vector")
    return FlowerEngine(data, trainer, rebuild, num_workers=num_workers or available_cores(), timeout=timeout)


class FlowerEngine(BaseEngine):
    """Train clients at the nodes of Flower's simulation. Call `close` to end Flower's threads.

    `flower` builds this engine and checks its settings.

    Args:
        data: data of the scenario.
        trainer: trainer of the scenario; only its layout is used here.
        rebuild: picklable function that builds the same `Scenario` in each of Ray's processes.
        num_workers: number of Ray actors of one core each, >= 1.
        timeout: seconds for the clients of a round to respond, > 0.
    """

    def __init__(
        self, data: FederatedData, trainer: Trainer, rebuild: Callable[[], Any], *, num_workers: int, timeout: float
    ) -> None:
        super().__init__(data.clients, trainer.layout)
        self._num_workers = num_workers
        self._node = _Node(_Named(rebuild), _Named(None), tuple(data.clients))
        self._simulation = Simulation(self._node.app(), len(data.clients), num_workers=num_workers, timeout_s=timeout)
        self._nodes: dict[ClientId, int] = {}

    def fit(self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Updates | Failure]:
        """Train the cohort with one message per client."""
        self._set_strategy(strategy)
        requests = {
            client: pack_request(request.for_client(client), self.client_states.get(client, {}))
            for client in sorted(cohort)
        }
        for result in self._results("train", requests, stage=FailureStage.FIT):
            if isinstance(result, Updates) and result.client_state:
                state = {name: rows_KD[0] for name, rows_KD in result.client_state.items()}
                self.client_states[int(result.clients_K[0])] = state
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
        return f"Flower's simulation, {number} Ray actor{'s' * (number != 1)}, one message per client"

    def close(self) -> None:
        """End the simulation and Ray; a second call has no effect."""
        self._simulation.close()

    def _results(self, kind: str, requests: Mapping[ClientId, bytes], *, stage: FailureStage) -> Iterator[Result]:
        """Yield the result of each client, in ascending order of clients; errors of Flower are failures."""
        if not self._nodes:
            responses = self._simulation.exchange("query", {node: RecordDict() for node in self._simulation.node_ids()})
            self._nodes = {_client_of(response): node for node, response in responses.items()}
        contents = {self._nodes[client]: to_record_dict(request) for client, request in requests.items()}
        responses = self._simulation.exchange(kind, contents)
        for client in requests:
            response = responses[self._nodes[client]]
            if response.has_error():
                yield Failure(client=client, stage=stage, reason=f"{response.error.reason}".strip())
            elif result := unpack_result(from_record_dict(response.content), client):
                yield result


@dataclass(frozen=True)
class _Named:
    """A value with a unique name. After pickling, two values are equal if their names are equal."""

    value: Any = field(compare=False)
    name: str = field(default_factory=lambda: uuid4().hex)


@dataclass
class _Node:
    """The functions of a node. Flower pickles them with each message, so each message has the present strategy."""

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
        request, state = unpack_request(from_record_dict(message.content))
        engine.client_states = {client: state} if state else {}
        (result,) = engine.fit(request, _value(self.strategy), [client])
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
    """Return the first value with this name. The same object is needed, because it is a key for compiled programs."""
    return named.value


def _client_of(response: Message) -> ClientId:
    if response.has_error():
        raise SimulationError(f"a node of Flower's simulation does not return its client: {response.error.reason}")
    return int(cast(int, response.content["about"]["client"]))


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
    """Return parameters to evaluate as bytes.

    Args:
        params_D: parameters of the model.
        state: client state of the personal model to evaluate, possibly empty; None: evaluate the model itself.
    """
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
    """Return the result of ``client``; None if the client has no held-out examples."""
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
