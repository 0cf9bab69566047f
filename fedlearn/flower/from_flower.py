"""Strategies written for Flower, in our simulator.

Shapes: K clients, D parameters laid flat.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fedlearn.algorithm.aggregation import Aggregator, stacked
from fedlearn.algorithm.client_selection import SamplingLaw, Selector
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context
from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import Array, ClientId, State, Updates
from fedlearn.errors import CheckpointError, FedlearnError, MissingExtra, require

try:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

    from fedlearn.flower.array_records import params_from_record, to_array_record
    from fedlearn.flower.compat import identify_as_server
    from fedlearn.flower.in_process_grid import FIRST_NODE_ID, InProcessGrid
    from fedlearn.flower.runtime import redirect_flower_log
    from fedlearn.flower.strategy_state import restore, take_snapshot
except ImportError as missing:
    raise MissingExtra("a strategy of Flower's", "flower") from missing

UNSAVED_ATTRIBUTES = "unsaved_attributes"  # of a strategy's state: the names of what no checkpoint holds
log = logging.getLogger(__name__)


def from_flower(flower: FlowerStrategy) -> Strategy:
    """A strategy written for Flower, as one of ours: any engine runs it, at that engine's speed.

    A round is Flower's: ``configure_train`` is shown the round's cohort, clients train from the global model, and
    ``aggregate_train`` makes the new one of their models, their numbers of examples and their training losses.

    What differs: the cohort is drawn by the run's seed, as large as ``fraction_train`` and ``min_train_nodes`` say;
    Flower draws by Python's global generator. Clients train as ``local`` says, not by a message's configuration.
    Evaluation is ours. Server halves of stages get the step of the strategy in place of an aggregate.

    Args:
        flower: `flwr.serverapp.strategy.Krum(...)`, or one of your own. It is not changed.

    *Guarantees*: a round depends on the state alone. What the strategy remembers (FedAdam's ``m_t``, FedAvgM's
    ``momentum_vector``) is kept as named arrays in the server's memory: a resumed run ends as an uninterrupted one.
    Attributes that are no arrays, numbers, words, records, or lists and dicts of these cannot be kept: a run whose
    strategy changes such a one goes on, but refuses to be resumed, and says which.

    Raises:
        SettingError: ``flower`` is no strategy of Flower's, or wraps another one.
    """
    ok = isinstance(flower, FlowerStrategy)
    expected, fix = "a flwr.serverapp.strategy.Strategy", "flower=flwr.serverapp.strategy.FedAvg()"
    require(ok, "flower", type(flower).__name__, expected, fix)
    alone = not any(isinstance(value, FlowerStrategy) for value in vars(flower).values())
    expected = "a strategy that wraps no other one, whose memory would be in no checkpoint"
    require(
        alone, "flower", type(flower).__name__, expected, "flower=... the one inside, and privacy as a stage of ours"
    )
    redirect_flower_log()
    identify_as_server()
    return Strategy(select=_as_flower_selects(flower), aggregate=_Rounds(flower).as_aggregator())


def _as_flower_selects(strategy: Any) -> Selector:
    """Uniform draws without replacement of as many clients as the strategy's settings say."""
    fraction, least = getattr(strategy, "fraction_train", 1.0), getattr(strategy, "min_train_nodes", 0)
    available = max(getattr(strategy, "min_available_nodes", 0), least)

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        name, most = "strategy.flower.min_available_nodes", len(clients)
        require(available <= most, name, available, f"at most {most}, the number of clients", f"+{name}={most}")
        size = max(int(most * fraction), least)
        name, expected = "strategy.flower.fraction_train", f"a share that is a client or more, of {most}"
        require(size > 0, name, fraction, expected, f"+{name}=1.0")
        return [clients[i] for i in rng.choice(most, size, replace=False, shuffle=False)]

    return Selector(choose=choose, law=SamplingLaw(kind="all") if fraction == 1 else None)


class _Rounds:
    """Run rounds of a Flower strategy as an aggregation rule: Flower aggregates and steps in one call."""

    def __init__(self, strategy: Any) -> None:
        self.strategy, self.first = strategy, take_snapshot(strategy)
        self.lost: dict[str, Any] = {}  # attributes that no checkpoint holds
        self.round_of_lost = 0

    def as_aggregator(self) -> Aggregator:
        """Return the aggregator for `Strategy.aggregate`."""
        return stacked(self.aggregate, reads=("clients_K", "metrics"))

    def aggregate(self, updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        """Run one round of the strategy. The update is the difference between its models after and before."""
        layout, params_D = context.layout, np.asarray(as_numpy(context.params_D))
        assert layout is not None
        strategy = self._as_it_was(state, context.round)
        arrays, config = to_array_record(params_D, layout), ConfigRecord()
        replies = _replies(strategy, updates, context, arrays, config)
        with _only_new_garbage():
            new, _ = strategy.aggregate_train(context.round, replies)
        if new is None:
            log.warning("round %d: %s kept the model as it is", context.round, type(strategy).__name__)
        step_D = np.zeros_like(params_D) if new is None else params_from_record(new, layout) - params_D
        return step_D, self._remember(strategy, context.round)

    def _as_it_was(self, memory: State, round: int) -> Any:
        strategy = restore(self.strategy, self.first, memory)
        if UNSAVED_ATTRIBUTES in memory:
            names = bytes(np.asarray(memory[UNSAVED_ATTRIBUTES])).decode().split()
            if self.round_of_lost != round - 1:
                kind = type(strategy).__name__
                raise CheckpointError(
                    f"a run with {kind} cannot be resumed: what it keeps in {', '.join(names)} is in no checkpoint\n"
                    "  try       arrays, numbers, words, or lists and dicts of these, in its attributes"
                )
            for name in names:
                setattr(strategy, name, self.lost[name])
        return strategy

    def _remember(self, strategy: Any, round: int) -> State:
        now = take_snapshot(strategy)
        memory, lost = now.changes_since(self.first)
        if not lost:
            return memory
        self.lost, self.round_of_lost = {name: now.unsupported[name] for name in lost}, round
        return {**memory, UNSAVED_ATTRIBUTES: np.frombuffer(" ".join(lost).encode(), np.uint8)}


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Have collections look at objects made meanwhile: Flower's QFedAvg asks for one, of all there are, a client."""
    if gc.get_freeze_count():  # somebody else's
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _replies(
    strategy: Any, updates: Updates, context: Context, arrays: ArrayRecord, config: ConfigRecord
) -> list[Message]:
    """Return the responses of the clients to the messages of the strategy, in ascending order of clients."""
    rows = {client: k for k, client in enumerate(updates.clients_K.tolist())}
    replies = {}
    for message in _messages(strategy, sorted(rows), context, arrays, config):
        if any(record is not arrays for record in message.content.array_records.values()):
            kind = type(strategy).__name__
            raise FedlearnError(f"{kind} sends clients other arrays than the global model, which no engine here does")
        client = message.metadata.dst_node_id - FIRST_NODE_ID
        replies[client] = _reply(strategy, message, updates, rows[client], context)
    return [replies[client] for client in sorted(replies)]


def _messages(
    strategy: Any, cohort: Sequence[ClientId], context: Context, arrays: ArrayRecord, config: ConfigRecord
) -> Iterable[Message]:
    """What the strategy sends when nobody but the cohort is there."""
    drawn = {"fraction_train": 1.0, "min_train_nodes": 0, "min_available_nodes": 0}
    own = {name: getattr(strategy, name) for name in drawn if hasattr(strategy, name)}
    for name in own:
        setattr(strategy, name, drawn[name])
    try:
        grid = InProcessGrid(ClientApp(), context.num_clients, available_partitions=cohort)
        return list(strategy.configure_train(context.round, arrays, config, grid))
    finally:
        for name, value in own.items():
            setattr(strategy, name, value)


def _reply(strategy: Any, message: Message, updates: Updates, k: int, context: Context) -> Message:
    assert context.layout is not None
    local_D = np.asarray(as_numpy(context.params_D)) + np.asarray(as_numpy(updates.delta_KD[k]), np.float32)
    metrics = MetricRecord({getattr(strategy, "weighted_by_key", "num-examples"): int(updates.num_examples_K[k])})
    if "loss" in updates.metrics:
        loss = updates.metrics["loss"]
        metrics[getattr(strategy, "train_loss_key", "train_loss")] = float(loss.total_K[k] / max(loss.count_K[k], 1))
    key = getattr(strategy, "arrayrecord_key", "arrays")
    return Message(RecordDict({key: to_array_record(local_D, context.layout), "metrics": metrics}), reply_to=message)
