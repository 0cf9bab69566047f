"""The engine for fidelity checks: clients train in Flower's own simulation runtime, each in answer to a message.

Shapes: K clients, C model outputs, D parameters laid flat.

Flower runs in a thread of its own and starts Ray; its ServerApp only lends its `Grid` to the loop. In Ray's actors a
ClientApp builds the scenario once and does for its node's client what the engine ``serial`` does. Order, update and
memory travel in Flower's messages, as safetensors. It is as slow as Flower: for speed there is ``vector``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast
from uuid import uuid4

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import Array, ClientId, Failure, Predictions, Request, State, Updates
from fedlearn.engines.base import InProcessEngine
from fedlearn.errors import MissingExtra, is_count, is_number, require
from fedlearn.loop.protocols import Trainer
from fedlearn.protocol.flower_simulation_messages import (  # fmt: skip
    Result,
    deserialize_model,
    deserialize_request,
    deserialize_result,
    serialize_model,
    serialize_request,
    serialize_result,
)
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

MAX_CLIENTS = 10_000  # Flower looks at every node ten times a second


def flower(
    data: FederatedData,
    trainer: Trainer,
    rebuild: Callable[[], Any],
    *,
    num_workers: int | None = None,
    timeout: float = 600.0,
) -> FlowerEngine:
    """Flower's simulation runtime with its Ray backend, one node for each client.

    Args:
        data: the scenario's.
        trainer: the scenario's; here it only tells the layout.
        rebuild: builds the same `Scenario` in each of Ray's processes; a function that can be pickled.
        num_workers: Ray actors of one core each; None takes one for each core.
        timeout: seconds for a round's clients to answer, the start of Ray included; > 0.

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


class FlowerEngine:
    """Sends orders to the nodes of Flower's simulation; made by `flower`. Close it: Flower's threads outlive a program.

    Attributes:
        clients, layout, memories: as in every engine.
    """

    deployed = False

    def __init__(
        self, data: FederatedData, trainer: Trainer, rebuild: Callable[[], Any], *, num_workers: int, timeout: float
    ) -> None:
        self.clients, self.layout = data.clients, trainer.layout
        self.client_states: dict[ClientId, State] = {}
        self._num_workers, self._timeout = num_workers, timeout
        self._node = _Node(_Named(rebuild), _Named(None), tuple(data.clients))
        self._simulation = Simulation(self._node.app(), len(data.clients), num_workers=num_workers, timeout_s=timeout)
        self._nodes: dict[ClientId, int] = {}

    def fit(self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Updates | Failure]:
        """Train the cohort, each client in answer to a message to its node."""
        self._tell(strategy)
        letters = {client: serialize_request(request, self.client_states.get(client, {})) for client in sorted(cohort)}
        for result in self._results("train", letters, stage="fit"):
            if isinstance(result, Updates) and result.client_state:
                own = {name: rows_KD[0] for name, rows_KD in result.client_state.items()}
                self.client_states[int(result.clients_K[0])] = own
            if isinstance(result, Updates | Failure):
                yield result

    def evaluate(
        self, params_D: Array, cohort: Sequence[ClientId], personal_strategy: Strategy | None = None
    ) -> Iterator[Predictions | Failure]:
        """The outputs of the model, or of each client's own, on the held-out part of each client, from its node."""
        letters = dict.fromkeys(sorted(cohort), serialize_model(params_D))
        if personal_strategy is not None:
            self._tell(personal_strategy)
            letters = {client: serialize_model(params_D, self.client_states.get(client, {})) for client in letters}
        for result in self._results("evaluate", letters, stage="evaluate"):
            if isinstance(result, Predictions | Failure):
                yield result

    def _tell(self, strategy: Strategy) -> None:
        """Send nodes this strategy from now on."""
        if strategy is not self._node.strategy.value:
            self._node.strategy = _Named(strategy)

    def describe(self, cohort_size: int) -> str:
        """How a cohort of so many clients is trained, for the header."""
        number = self._num_workers
        return f"Flower's simulation, {number} Ray actor{'s' * (number != 1)}, a message a client"

    def close(self) -> None:
        """End the simulation, and Ray with it; harmless when called twice."""
        self._simulation.close()

    def _results(self, kind: str, letters: Mapping[ClientId, bytes], *, stage: str) -> Iterator[Result]:
        """What each client's node brings back, in ascending order of clients; Flower's errors are failures."""
        if not self._nodes:
            replies = self._simulation.exchange("query", {node: RecordDict() for node in self._simulation.node_ids()})
            self._nodes = {_whose(reply): node for node, reply in replies.items()}
        contents = {self._nodes[client]: to_record_dict(letter) for client, letter in letters.items()}
        replies = self._simulation.exchange(kind, contents)
        for client in letters:
            reply = replies[self._nodes[client]]
            if reply.has_error():
                yield Failure(client=client, stage=stage, reason=f"{reply.error.reason}".strip())
            elif result := deserialize_result(from_record_dict(reply.content), client):
                yield result


@dataclass(frozen=True)
class _Named:
    """Something under a name of its own: what is pickled anew with each message is the same if its name is."""

    value: Any = field(compare=False)
    name: str = field(default_factory=lambda: uuid4().hex)


@dataclass
class _Node:
    """What a node does. Flower pickles it with each message, so that it brings the strategy of the moment."""

    rebuild: _Named
    strategy: _Named
    clients: Sequence[ClientId]

    def app(self) -> ClientApp:
        """As Flower calls it."""
        app = ClientApp()
        app.query()(self.about)
        app.train()(self.train)
        app.evaluate()(self.evaluate)
        return app

    def about(self, message: Message, context: Context) -> Message:
        """Which client lives here."""
        return Message(RecordDict({"about": ConfigRecord({"client": self._client(context)})}), reply_to=message)

    def train(self, message: Message, context: Context) -> Message:
        """Train this node's client."""
        client, engine = self._client(context), _engine(self.rebuild)
        order, memory = deserialize_request(from_record_dict(message.content))
        engine.client_states = {client: memory} if memory else {}
        (result,) = engine.fit(order, _value(self.strategy), [client])
        return Message(to_record_dict(serialize_result(result)), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Predict for this node's client; an empty letter if it has no held-out part."""
        client, engine = self._client(context), _engine(self.rebuild)
        params_D, memory = deserialize_model(from_record_dict(message.content))
        engine.client_states = {client: memory} if memory else {}
        own = None if memory is None else _value(self.strategy)
        results = [*engine.evaluate(params_D, [client], own), None]
        return Message(to_record_dict(serialize_result(results[0])), reply_to=message)

    def _client(self, context: Context) -> ClientId:
        return int(self.clients[int(context.node_config["partition-id"])])


@lru_cache(maxsize=1)
def _engine(rebuild: _Named) -> InProcessEngine:
    """Built once in each of Ray's processes."""
    scenario = rebuild.value()
    return InProcessEngine(scenario.data, scenario.trainer, block_size=1)


@lru_cache(maxsize=1)
def _value(named: _Named) -> Any:
    """The first of equal names: compiled programs are kept by a strategy's parts."""
    return named.value


def _whose(reply: Message) -> ClientId:
    if reply.has_error():
        raise SimulationError(f"a node of Flower's simulation cannot say who it is: {reply.error.reason}")
    return int(cast(int, reply.content["about"]["client"]))
