"""Refuse a Flower strategy with a part that fedlearn would not run, and name the part.

Clients of fedlearn train by the settings ``local`` and the local rule of a strategy, and fedlearn evaluates the model.
So a strategy that configures clients, evaluates by itself or has its own loop would run as another algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedXgbBagging, FedXgbCyclic
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlearn.errors import require
from fedlearn.flower.in_process_grid import InProcessGrid

ROUND_KEY = "server-round"  # entry of a message that each stock strategy adds
EQUIVALENTS = {  # entry of a message -> setting of fedlearn with the same effect
    "proximal-mu": "strategy=fedprox strategy.mu=0.1",
    "lr": "local.learning_rate=0.1",
    "learning-rate": "local.learning_rate=0.1",
    "local-epochs": "local.epochs=1",
    "epochs": "local.epochs=1",
    "batch-size": "local.batch_size=32",
}
OVERRIDDEN = {  # method that fedlearn does not call -> setting or advice
    "start": "a strategy without a loop; the settings rounds and early_stop control the loop",
    "configure_evaluate": "evaluate_every=1",
    "aggregate_evaluate": "a metric of fedlearn: metrics=[my_code.my_metric]",
}
EVALUATION = {"fraction_evaluate": (1.0, "evaluate_clients=1000"), "min_evaluate_nodes": (2, "evaluate_clients=1000")}
FUNCTIONS = {
    "train_metrics_aggr_fn": "a metric of fedlearn: metrics=[my_code.my_metric]",
    "evaluate_metrics_aggr_fn": "a metric of fedlearn: metrics=[my_code.my_metric]",
}
PROBE_NODES = 100  # nodes of the grid that shows the messages of round 1


def check_strategy(strategy: FlowerStrategy) -> None:
    """Refuse a strategy with a part that fedlearn would not run.

    The messages of round 1 are looked at here. `check_message` looks at the messages of each round.

    Raises:
        SettingError: the strategy builds trees, has methods or functions that fedlearn does not call, or configures
            its clients. The error names the part.
    """
    kind = type(strategy).__name__
    expected = "a strategy that aggregates the arrays of a model"
    fix = "your app with its own ServerApp: python -m fedlearn.flower.run path/to/app"
    require(not isinstance(strategy, FedXgbBagging | FedXgbCyclic), "strategy.flower", kind, expected, fix)
    for name, advice in OVERRIDDEN.items():
        is_stock = _is_from_flower(getattr(type(strategy), name))
        expected = f"a strategy without its own {name}, which fedlearn does not call"
        require(is_stock, "strategy.flower", kind, expected, advice)
    for name, (default, advice) in EVALUATION.items():
        value = getattr(strategy, name, default)
        expected = f"{default}, because fedlearn evaluates the model"
        require(value == default, f"strategy.flower.{name}", value, expected, advice)
    for name, advice in FUNCTIONS.items():
        function = getattr(strategy, name, None)
        is_stock = function is None or _is_from_flower(function)
        expected = "null, because fedlearn aggregates the metrics"
        require(is_stock, f"strategy.flower.{name}", getattr(function, "__name__", kind), expected, advice)
    for message in _first_messages(strategy):
        check_message(strategy, message)


def check_message(strategy: FlowerStrategy, message: Message) -> None:
    """Refuse a message with other entries than the number of the round.

    Raises:
        SettingError: the message has another entry; the error names it.
    """
    records: list[Mapping[str, Any]] = [*message.content.config_records.values()]
    for record in (*records, *message.content.metric_records.values()):
        _check_entries(strategy, record)


def _check_entries(strategy: FlowerStrategy, record: Mapping[str, Any]) -> None:
    entries = {name: value for name, value in record.items() if name != ROUND_KEY}
    for name, value in entries.items():
        text = f"{type(strategy).__name__}, which sends its clients {name}={value}"
        expected = "a strategy whose clients need no configuration, because clients of fedlearn train by its settings"
        fix = EQUIVALENTS.get(name, "the local rule of a strategy: docs/extend/strategy.md")
        require(False, "strategy.flower", text, expected, fix)


def _first_messages(strategy: FlowerStrategy) -> list[Message]:
    """Return the messages of a copy of the strategy in round 1; empty if it needs the real model for them."""
    arrays = ArrayRecord({"weight": Array("float32", (1,), "numpy.ndarray", b"\0\0\0\0")})
    try:
        grid = InProcessGrid(ClientApp(), PROBE_NODES)
        return list(deepcopy(strategy).configure_train(1, arrays, ConfigRecord(), grid))
    except Exception:
        return []


def _is_from_flower(function: Any) -> bool:
    return str(getattr(function, "__module__", "flwr")).partition(".")[0] == "flwr"
