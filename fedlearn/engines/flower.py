"""The engine for fidelity checks: clients train in Flower's own simulation runtime, each in answer to a message.

Shapes: K clients, C model outputs, D parameters laid flat.

Flower runs in a thread of its own and starts Ray; its ServerApp only lends its `Grid` to the loop. In Ray's actors a
ClientApp builds the scenario once and does for its node's client what the engine ``serial`` does. Order, update and
memory travel in Flower's messages, as safetensors. It is as slow as Flower: for speed there is ``vector``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any, cast
from uuid import uuid4

import numpy as np
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from fedlearn.arrays import as_numpy
from fedlearn.data.federated import FederatedData
from fedlearn.engines.base import LocalEngine
from fedlearn.errors import FedlearnError, MissingExtra, is_count, is_number, require
from fedlearn.records import (
    Array,
    ClientId,
    ExampleDP,
    Failure,
    LocalSettings,
    Memory,
    Order,
    Predictions,
    Sum,
    Updates,
)  # fmt: skip
from fedlearn.strategy import Strategy
from fedlearn.trainers.base import Trainer, available_cores

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
try:
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

    from fedlearn.flower.envelope import disclose, enclose
    from fedlearn.flower.process import leave_the_terminal
except ImportError as missing:
    raise MissingExtra("engine=flower", "flower") from missing

MOST_CLIENTS = 10_000  # Flower looks at every node ten times a second
BETWEEN_LOOKS = 0.05  # seconds
Result = Updates | Predictions | Failure


class SimulationError(FedlearnError):
    """Flower's simulation could not start, or did not answer in time."""


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
    most = f"a scenario of at most {MOST_CLIENTS} clients; this has {len(data.clients)}"
    require(len(data.clients) <= MOST_CLIENTS, "engine", "flower", most, "engine=vector")
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
        self.memories: dict[ClientId, Memory] = {}
        self._num_workers, self._timeout = num_workers, timeout
        self._node = _Node(_Named(rebuild), _Named(None), tuple(data.clients))
        self._simulation = _Simulation(self._node.app(), len(data.clients), num_workers=num_workers, timeout=timeout)
        self._nodes: dict[ClientId, int] = {}

    def fit(self, order: Order, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Updates | Failure]:
        """Train the cohort, each client in answer to a message to its node."""
        if strategy is not self._node.strategy.value:
            self._node.strategy = _Named(strategy)
        letters = {client: _order_letter(order, self.memories.get(client, {})) for client in sorted(cohort)}
        for client, letter in self._exchange("train", letters):
            result = _opened(client, letter, stage="fit")
            if isinstance(result, Updates) and result.memory:
                self.memories[client] = {name: rows_KD[0] for name, rows_KD in result.memory.items()}
            if isinstance(result, Updates | Failure):
                yield result

    def evaluate(self, params_D: Array, cohort: Sequence[ClientId]) -> Iterator[Predictions | Failure]:
        """The model's outputs on the held-out part of each client, from its node."""
        letter = _letter({}, {"params": params_D})
        for client, answer in self._exchange("evaluate", dict.fromkeys(sorted(cohort), letter)):
            result = _opened(client, answer, stage="evaluate")
            if isinstance(result, Predictions | Failure):
                yield result

    def describe(self, cohort_size: int) -> str:
        """How a cohort of so many clients is trained, for the header."""
        number = self._num_workers
        return f"Flower's simulation, {number} Ray actor{'s' * (number != 1)}, a message a client"

    def close(self) -> None:
        """End the simulation, and Ray with it; harmless when called twice."""
        self._simulation.close()

    def _exchange(self, kind: str, letters: Mapping[ClientId, bytes]) -> Iterator[tuple[ClientId, Message]]:
        """The reply of each client's node, in ascending order of clients."""
        if not self._nodes:
            asked = {node: RecordDict() for node in self._simulation.grid.get_node_ids()}
            replies = self._simulation.replies("query", asked)
            self._nodes = {_whose(reply): node for node, reply in replies.items()}
        contents = {self._nodes[client]: enclose(letter) for client, letter in letters.items()}
        replies = self._simulation.replies(kind, contents)
        for client in letters:
            yield client, replies[self._nodes[client]]


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
        order, memory = _order_of(disclose(message.content))
        engine.memories = {client: memory} if memory else {}
        (result,) = engine.fit(order, _value(self.strategy), [client])
        return Message(enclose(_result_letter(result)), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Predict for this node's client; an empty letter if it has no held-out part."""
        _, arrays = _read(disclose(message.content))
        results = list(_engine(self.rebuild).evaluate(arrays["params"], [self._client(context)]))
        return Message(enclose(_result_letter(results[0]) if results else _letter({}, {})), reply_to=message)

    def _client(self, context: Context) -> ClientId:
        return int(self.clients[int(context.node_config["partition-id"])])


@lru_cache(maxsize=1)
def _engine(rebuild: _Named) -> LocalEngine:
    """Built once in each of Ray's processes."""
    scenario = rebuild.value()
    return LocalEngine(scenario.data, scenario.trainer, block_size=1)


@lru_cache(maxsize=1)
def _value(named: _Named) -> Any:
    """The first of equal names: compiled programs are kept by a strategy's parts."""
    return named.value


class _Simulation:
    """Flower's simulation, in a thread of its own for as long as its ServerApp waits."""

    def __init__(self, app: ClientApp, num_nodes: int, *, num_workers: int, timeout: float) -> None:
        self._timeout, self._over, self._grids = timeout, Event(), Queue[Grid]()
        self._error: BaseException | None = None
        self._folder = TemporaryDirectory(prefix="fl-", ignore_cleanup_errors=True)
        leave_the_terminal()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray announces that it will change
        resources = {"num_cpus": 1, "num_gpus": 0.0}
        init = {
            "num_cpus": num_workers,
            "logging_level": "error",
            "log_to_driver": False,
            "_temp_dir": self._folder.name,
        }
        backend: Any = {"client_resources": resources, "init_args": init}
        self._thread = Thread(target=self._run, args=(app, num_nodes, backend), daemon=True)
        self._thread.start()
        try:
            self.grid = self._first_grid()
        except BaseException:
            self.close()
            raise

    def replies(self, kind: str, contents: Mapping[int, RecordDict]) -> dict[int, Message]:
        """What each node replies.

        Raises:
            SimulationError: Flower has ended, or a node did not reply in time.
        """
        ends = time.monotonic() + self._timeout
        later = 2 * self._timeout + 60  # than our own deadline, which says more
        sent = [Message(content, node, kind, ttl=later) for node, content in contents.items()]
        waiting = dict(zip(self.grid.push_messages(sent), contents, strict=True))
        found: dict[int, Message] = {}
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                found[waiting.pop(reply.metadata.reply_to_message_id)] = reply
            if waiting:
                self._refuse_to_wait(ends, f"{len(waiting)} of {len(contents)} nodes have not answered")
        return found

    def close(self) -> None:
        """Let the ServerApp return, which ends the simulation."""
        self._over.set()
        self._thread.join(timeout=30)
        self._folder.cleanup()

    def _run(self, app: ClientApp, num_nodes: int, backend: Any) -> None:
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            self._grids.put(grid)
            self._over.wait()

        try:
            from flwr.simulation import run_simulation

            run_simulation(server, app, num_nodes, backend_config=backend)
        except BaseException as error:
            self._error = error

    def _first_grid(self) -> Grid:
        ends = time.monotonic() + self._timeout
        while True:
            with suppress(Empty):
                return self._grids.get(timeout=BETWEEN_LOOKS)
            self._refuse_to_wait(ends, "it has not started")

    def _refuse_to_wait(self, ends: float, for_what: str) -> None:
        """Sleep a moment, unless there is nothing to wait for any more."""
        if not self._thread.is_alive():
            cause = self._error and (self._error.__cause__ or self._error)
            raise SimulationError(f"Flower's simulation has ended: {type(cause).__name__}: {cause}") from self._error
        if time.monotonic() > ends:
            fix = f"engine.timeout={10 * self._timeout:g}"
            raise SimulationError(f"Flower's simulation: {for_what} in {self._timeout:g} s\n  try       {fix}")
        time.sleep(BETWEEN_LOOKS)


# --- letters ----------------------------------------------------------------------------------------------------------


def _whose(reply: Message) -> ClientId:
    if reply.has_error():
        raise SimulationError(f"a node of Flower's simulation cannot say who it is: {reply.error.reason}")
    return int(cast(int, reply.content["about"]["client"]))


def _letter(facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> bytes:
    own = {name: np.ascontiguousarray(as_numpy(array)) for name, array in arrays.items()}
    return to_safetensors(own, metadata={"facts": json.dumps(facts)})


def _read(letter: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """Facts and arrays; safetensors itself reads the facts from files only, where they are JSON after its size."""
    size = int.from_bytes(letter[:8], "little")
    facts = json.loads(json.loads(letter[8 : 8 + size])["__metadata__"]["facts"])
    return facts, from_safetensors(letter)


def _order_letter(order: Order, memory: Memory) -> bytes:
    facts = {"round": order.round, "seed": order.seed, "local": asdict(order.local)}
    arrays = {"params": order.params_D, **_under("broadcast", order.broadcast), **_under("memory", memory)}
    return _letter(facts, arrays)


def _order_of(letter: bytes) -> tuple[Order, Memory]:
    facts, arrays = _read(letter)
    private = facts["local"].pop("example_dp")
    local = LocalSettings(**facts.pop("local"), example_dp=ExampleDP(**private) if private else None)
    order = Order(**facts, local=local, params_D=arrays["params"], broadcast=_those_under("broadcast", arrays))
    return order, _those_under("memory", arrays)


def _result_letter(result: Result) -> bytes:
    if isinstance(result, Failure):
        return _letter({"stage": result.stage, "reason": result.reason, "traceback": result.traceback}, {})
    if isinstance(result, Predictions):
        return _letter({}, {"outputs": result.outputs, "targets": result.targets})
    arrays = {name: getattr(result, name) for name in ("delta_KD", "num_examples_K", "num_steps_K", "num_bytes_K")}
    arrays |= _under("memory", result.memory) | _under("extra", result.extra)
    arrays |= _under("total", {name: one.total_K for name, one in result.metrics.items()})
    arrays |= _under("count", {name: one.count_K for name, one in result.metrics.items()})
    return _letter({}, arrays)


def _opened(client: ClientId, reply: Message, *, stage: str) -> Result | None:
    """What a node's reply says; None if it says nothing."""
    if reply.has_error():
        return Failure(client=client, stage=stage, reason=f"{reply.error.reason}".strip())
    facts, arrays = _read(disclose(reply.content))
    if "stage" in facts:
        return Failure(client=client, **facts)
    if "outputs" in arrays:
        return Predictions(client=client, **arrays)
    if not arrays:
        return None
    totals, counts = _those_under("total", arrays), _those_under("count", arrays)
    return Updates(
        clients_K=np.array([client]),
        delta_KD=arrays["delta_KD"],
        num_examples_K=arrays["num_examples_K"],
        num_steps_K=arrays["num_steps_K"],
        num_bytes_K=arrays["num_bytes_K"],
        metrics={name: Sum(totals[name], counts[name]) for name in totals},
        memory=_those_under("memory", arrays),
        extra=_those_under("extra", arrays),
    )


def _under(group: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}/{name}": array for name, array in arrays.items()}


def _those_under(group: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}
