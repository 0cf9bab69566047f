"""Run strategies that were written for Flower in every engine of fedlearn.

Shapes: K clients, D parameters, flattened.
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
    from fedlearn.flower.compat.messages import identify_as_server
    from fedlearn.flower.in_process_grid import FIRST_NODE_ID, InProcessGrid
    from fedlearn.flower.runtime import redirect_flower_log
    from fedlearn.flower.strategy_checks import check_message, check_strategy
    from fedlearn.flower.strategy_state import restore, take_snapshot
except ImportError as missing:
    raise MissingExtra("a Flower strategy", "flower") from missing

UNSAVED_ATTRIBUTES = "unsaved_attributes"  # entry of the server state: names of attributes that are in no checkpoint
log = logging.getLogger(__name__)


def from_flower(flower: FlowerStrategy) -> Strategy:
    """Convert a Flower strategy to a `Strategy`, which runs in any engine at the speed of that engine.

    In each round, ``configure_train`` gets the cohort, and clients train from the global model. ``aggregate_train``
    computes the new model from their models, example counts and training losses.

    Differences from Flower: the seed of the run determines the cohort, with the size that ``fraction_train`` and
    ``min_train_nodes`` give. Flower draws with Python's global generator. The settings ``local`` control training, and
    fedlearn evaluates the model. So a strategy that configures its clients, such as FedProx, is refused. Server halves
    of stages receive the step of the strategy instead of an aggregate.

    Args:
        flower: `flwr.serverapp.strategy.Krum(...)`, or a strategy of your own. It is not changed.

    *Guarantees*: a round depends on the server state only. It holds the attributes that the strategy changes (``m_t``
    of FedAdam, ``momentum_vector`` of FedAvgM) as named arrays, so a resumed run equals an uninterrupted one. Supported
    types are arrays, numbers, strings, records, and lists and dicts of these. If a strategy changes an attribute of
    another type, the run continues, but a resume is refused with the name of the attribute.

    Raises:
        SettingError: ``flower`` is not a Flower strategy, wraps another strategy, configures its clients, or has a part
            that fedlearn does not call. See `fedlearn.flower.strategy_checks`.
    """
    is_flower = isinstance(flower, FlowerStrategy)
    expected, fix = "a flwr.serverapp.strategy.Strategy", "flower._target_=flwr.serverapp.strategy.FedAvg"
    require(is_flower, "flower", type(flower).__name__, expected, fix)
    wraps_no_other = not any(isinstance(value, FlowerStrategy) for value in vars(flower).values())
    expected = "a strategy that wraps no other one, because no checkpoint would have the state of the inner one"
    require(
        wraps_no_other,
        "flower",
        type(flower).__name__,
        expected,
        "pass the inner strategy, and add privacy as a stage of fedlearn",
    )
    redirect_flower_log()
    identify_as_server()
    check_strategy(flower)
    return Strategy(select=_flower_selector(flower), aggregate=_FlowerAggregation(flower).as_aggregator())


def _flower_selector(strategy: Any) -> Selector:
    """Return a selector that draws uniformly without replacement, as many clients as the Flower settings give."""
    fraction, min_clients = getattr(strategy, "fraction_train", 1.0), getattr(strategy, "min_train_nodes", 0)
    available = max(getattr(strategy, "min_available_nodes", 0), min_clients)

    def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
        name, num_clients = "strategy.flower.min_available_nodes", len(clients)
        require(
            available <= num_clients,
            name,
            available,
            f"at most {num_clients}, the number of clients",
            f"+{name}={num_clients}",
        )
        size = max(int(num_clients * fraction), min_clients)
        name, expected = "strategy.flower.fraction_train", f"a share of at least one client, of {num_clients} clients"
        require(size > 0, name, fraction, expected, f"+{name}=1.0")
        return [clients[i] for i in rng.choice(num_clients, size, replace=False, shuffle=False)]

    return Selector(choose=choose, law=SamplingLaw(kind="all") if fraction == 1 else None)


class _FlowerAggregation:
    """Run rounds of a Flower strategy as an aggregation rule: Flower aggregates and steps in one call."""

    def __init__(self, strategy: Any) -> None:
        self.strategy, self.initial = strategy, take_snapshot(strategy)
        self.unsaved: dict[str, Any] = {}  # attributes that are in no checkpoint
        self.round_of_unsaved = 0

    def as_aggregator(self) -> Aggregator:
        """Return the aggregator for `Strategy.aggregate`."""
        return stacked(self.aggregate, reads=("clients_K", "metrics"))

    def aggregate(self, updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        """Run one round of the strategy. Return the difference between the new and the old model, and the new state."""
        layout, params_D = context.layout, np.asarray(as_numpy(context.params_D))
        assert layout is not None
        strategy = self._strategy_at(state, context.round)
        arrays, config = to_array_record(params_D, layout), ConfigRecord()
        responses = _responses(strategy, updates, context, arrays, config)
        with _only_new_garbage(), _explained(strategy):
            new, _ = strategy.aggregate_train(context.round, responses)
        if new is None:
            log.warning("round %d: %s did not change the model", context.round, type(strategy).__name__)
        step_D = np.zeros_like(params_D) if new is None else params_from_record(new, layout) - params_D
        return step_D, self._save(strategy, context.round)

    def _strategy_at(self, state: State, round: int) -> Any:
        strategy = restore(self.strategy, self.initial, state)
        if UNSAVED_ATTRIBUTES in state:
            names = bytes(np.asarray(state[UNSAVED_ATTRIBUTES])).decode().split()
            if self.round_of_unsaved != round - 1:
                kind = type(strategy).__name__
                raise CheckpointError(
                    f"a run with {kind} cannot be resumed: its attributes {', '.join(names)} are in no checkpoint\n"
                    "  expected  arrays, numbers, strings or records\n"
                    "  advice    a new run"
                )
            for name in names:
                setattr(strategy, name, self.unsaved[name])
        return strategy

    def _save(self, strategy: Any, round: int) -> State:
        snapshot = take_snapshot(strategy)
        state, changed_unsupported = snapshot.changes_since(self.initial)
        if not changed_unsupported:
            return state
        self.unsaved, self.round_of_unsaved = {name: snapshot.unsupported[name] for name in changed_unsupported}, round
        return {**state, UNSAVED_ATTRIBUTES: np.frombuffer(" ".join(changed_unsupported).encode(), np.uint8)}


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Restrict garbage collections to new objects: Flower's QFedAvg starts one full collection per client."""
    if gc.get_freeze_count():  # another caller has frozen objects
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _explained(strategy: Any) -> Iterator[None]:
    """Explain an error of a strategy by the values that it receives."""
    try:
        yield
    except FedlearnError:
        raise
    except Exception as error:
        reports = f"the arrays of the model, {getattr(strategy, 'weighted_by_key', 'num-examples')}"
        reports += f" and {getattr(strategy, 'train_loss_key', 'train_loss')}"
        kind, text = type(strategy).__name__, f"{type(error).__name__}: {error}"
        raise FedlearnError(
            f"{kind} cannot aggregate the responses of the clients: {text}\n"
            f"  expected  a strategy that needs {reports} only\n"
            "  advice    a strategy of fedlearn: docs/extend/strategy.md"
        ) from error


def _responses(
    strategy: Any, updates: Updates, context: Context, arrays: ArrayRecord, config: ConfigRecord
) -> list[Message]:
    """Return the responses of the clients to the messages of the strategy, in ascending order of client ids."""
    rows = {client: k for k, client in enumerate(updates.clients_K.tolist())}
    responses = {}
    for message in _messages(strategy, sorted(rows), context, arrays, config):
        check_message(strategy, message)
        if any(record is not arrays for record in message.content.array_records.values()):
            kind = type(strategy).__name__
            raise FedlearnError(
                f"{kind} sends clients other arrays than the global model, and no engine of fedlearn supports this"
            )
        client = message.metadata.dst_node_id - FIRST_NODE_ID
        responses[client] = _response(strategy, message, updates, rows[client], context)
    return [responses[client] for client in sorted(responses)]


def _messages(
    strategy: Any, cohort: Sequence[ClientId], context: Context, arrays: ArrayRecord, config: ConfigRecord
) -> Iterable[Message]:
    """Return the messages of the strategy if only the clients of the cohort are available."""
    selects_all = {"fraction_train": 1.0, "min_train_nodes": 0, "min_available_nodes": 0}
    settings = {name: getattr(strategy, name) for name in selects_all if hasattr(strategy, name)}
    for name in settings:
        setattr(strategy, name, selects_all[name])
    try:
        grid = InProcessGrid(ClientApp(), context.num_clients, available_partitions=cohort)
        return list(strategy.configure_train(context.round, arrays, config, grid))
    finally:
        for name, value in settings.items():
            setattr(strategy, name, value)


def _response(strategy: Any, message: Message, updates: Updates, k: int, context: Context) -> Message:
    assert context.layout is not None
    local_D = np.asarray(as_numpy(context.params_D)) + np.asarray(as_numpy(updates.delta_KD[k]), np.float32)
    metrics = MetricRecord({getattr(strategy, "weighted_by_key", "num-examples"): int(updates.num_examples_K[k])})
    if "loss" in updates.metrics:
        loss = updates.metrics["loss"]
        metrics[getattr(strategy, "train_loss_key", "train_loss")] = float(loss.total_K[k] / max(loss.count_K[k], 1))
    key = getattr(strategy, "arrayrecord_key", "arrays")
    return Message(RecordDict({key: to_array_record(local_D, context.layout), "metrics": metrics}), reply_to=message)
