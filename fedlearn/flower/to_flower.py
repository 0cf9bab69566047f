"""Run strategies of fedlearn in a Flower ServerApp.

Shapes: K clients, D parameters, flattened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedlearn.algorithm.aggregation import PartialAggregate, accumulate
from fedlearn.algorithm.local_rule import plain_training
from fedlearn.algorithm.strategy import CompositionError, Strategy
from fedlearn.algorithm.transforms import Context, identity
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Failure, FailureStage, ServerState, Updates
from fedlearn.errors import FedlearnError, is_count, is_number, require
from fedlearn.flower.array_records import layout_from_record, params_from_record, to_array_record
from fedlearn.loop.server_step import server_step
from fedlearn.loop.training_loop import initial_server_state

log = logging.getLogger(__name__)


def to_flower(strategy: Strategy, *, seed: int = 1, timeout_s: float = 600.0, **settings: Any) -> FlowerStrategy:
    """Convert a strategy for a Flower ServerApp whose ClientApps return arrays and a number of examples.

    The strategy selects the cohort, aggregates and steps; Flower's `FedAvg` evaluates. Clients run the code of the app.
    A strategy with client halves, or with a privacy claim, is therefore refused. The server state lives as long as the
    returned object, as in Flower's own strategies.

    Args:
        strategy: a strategy with plain local training, and with stages that work on the server only.
        seed: seed of the selection, >= 0.
        timeout_s: seconds to wait for ``min_available_nodes`` nodes, > 0.
        settings: arguments of Flower's ``FedAvg``, except ``fraction_train`` and ``min_train_nodes``, because the
            strategy selects the cohort.

    *Guarantees*: an invalid response never changes the global model. It is logged and left out. A response is invalid
    if it is an error or has no examples. A model with infinite or NaN values, or with other names or shapes, is invalid
    too. Arrays keep their names, order and dtypes. They are averaged as float32 values, with sums in float64.

    Raises:
        CompositionError: the strategy has client halves, or claims privacy.
        SettingError: a setting is out of range.
    """
    _refuse_client_work(strategy)
    require(is_count(seed, at_least=0), "seed", seed, "a whole number >= 0", "seed=1")
    is_positive = is_number(timeout_s, at_least=0) and timeout_s > 0
    require(is_positive, "timeout_s", timeout_s, "seconds > 0", "timeout_s=600")
    for name in ("fraction_train", "min_train_nodes"):
        expected = "no such argument, because the strategy selects the cohort"
        require(name not in settings, name, settings.get(name), expected, "uniform(clients_per_round)")
    return _FlowerAdapter(strategy, seed=seed, timeout=timeout_s, **settings)


def _refuse_client_work(strategy: Strategy) -> None:
    if strategy.local != plain_training:
        raise CompositionError(
            "the strategy changes local training, but a Flower ClientApp trains with its own code\n"
            "  expected  local=plain_training\n"
            "  advice    the same change in the ClientApp"
        )
    if strategy.select.update is not None:
        raise CompositionError(
            "the strategy selects clients by their earlier metrics, which Flower does not pass to strategies\n"
            "  try       select=uniform(clients_per_round)"
        )
    if set(strategy.aggregate.reads) & {"metrics", "extra"}:
        raise CompositionError(
            f"the aggregation rule reads {', '.join(strategy.aggregate.reads)}, but a ClientApp does not send them\n"
            "  advice    a rule that reads updates and numbers of examples only"
        )
    if strategy.aggregate.client_models is not None:
        raise CompositionError(
            "the strategy sends each client its own model, but Flower sends one model to all\n"
            "  advice    engine=flower, which runs this strategy in Flower's simulation"
        )
    if strategy.privacy_guarantee is not None or any(stage.event is not None for stage in strategy.stages):
        raise CompositionError(
            "the strategy claims privacy, but a ClientApp does not enforce its bounds\n"
            "  advice    python -m fedlearn.deploy.submit, or differential privacy of Flower"
        )
    for number, stage in enumerate(strategy.stages):
        if stage.client != identity or stage.codec is not None:
            raise CompositionError(
                f"stage {number} of the strategy has a client half, which a Flower ClientApp does not run\n"
                "  advice    a Flower mod in the ClientApp, e.g. flwr.clientapp.mod.fixedclipping_mod"
            )


class _FlowerAdapter(FedAvg):
    """Implement Flower's interface: `configure_train`, followed by `aggregate_train`, in each round."""

    def __init__(self, strategy: Strategy, *, seed: int, timeout: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.strategy, self.seed, self.timeout = strategy, seed, timeout
        self.state: ServerState | None = None
        self.sent, self.cohort, self.population = ArrayRecord(), 0, 0

    def summary(self) -> None:
        """Log the name of the strategy, when Flower starts."""
        log.info("strategy of fedlearn, seed %d", self.seed)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return messages to the cohort that the strategy selects."""
        layout = layout_from_record(arrays)
        nodes = self._nodes(grid)
        rng = generator(self.seed, Purpose.SELECT, round=server_round)
        cohort = sorted(self.strategy.select.choose(server_round, nodes, rng))
        zeros_D = np.zeros(layout.num_parameters, np.float32)
        before = self.state or initial_server_state(self.strategy, zeros_D, layout, seed=self.seed)
        self.state = replace(before, round=server_round - 1, params_D=params_from_record(arrays, layout))
        self.sent, self.cohort, self.population = arrays, len(cohort), len(nodes)
        config["server-round"] = server_round
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return [Message(content, node, "train") for node in cohort]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new model, and the training metrics of the clients."""
        assert self.state is not None, "configure_train was not called before aggregate_train"
        layout = layout_from_record(self.sent)
        partial, metrics = PartialAggregate(aggregator_state=self.strategy.aggregate.init(layout)), []
        for response in sorted(replies, key=lambda message: message.metadata.src_node_id):
            result = self._update(response, layout)
            if isinstance(result, Failure):
                log.warning("node %d is left out: %s", result.client, result.reason)
            else:
                metrics.append(response.content)
            partial = accumulate(partial, self.strategy.aggregate, result)
        if not partial.num_updates:
            return None, None
        context = Context(
            round=server_round,
            seed=self.seed,
            num_clients=self.population,
            cohort_size=self.cohort,
            params_D=self.state.params_D,
            layout=layout,
            deployed=True,  # nodes may be real, so noise must not follow from the seed
        )
        aggregator = self.strategy.aggregate
        update_D, rule_state = aggregator.finish(partial.aggregator_state, self.state.aggregate, context)
        params_D, server, stages = server_step(self.strategy, self.state, update_D, context, layout)
        self.state = replace(
            self.state, round=server_round, params_D=params_D, server=server, stages=stages, aggregate=rule_state
        )
        dtypes = {name: array.dtype for name, array in self.sent.items()}
        arrays = to_array_record(np.asarray(as_numpy(params_D)), layout, dtypes)
        new_arrays = ArrayRecord({name: arrays[name] for name in self.sent})
        return new_arrays, self.train_metrics_aggr_fn(metrics, self.weighted_by_key)

    def _update(self, response: Message, layout: Layout) -> Updates | Failure:
        node = response.metadata.src_node_id
        assert self.state is not None
        try:
            if response.has_error():
                raise ValueError(response.error.reason)
            (arrays,), (metrics,) = response.content.array_records.values(), response.content.metric_records.values()
            count = metrics[self.weighted_by_key]
            if not (isinstance(count, int | float) and 0 < count < float("inf")):
                raise ValueError(f"{self.weighted_by_key} is {count}, expected a number > 0")
            delta_D = params_from_record(arrays, layout) - self.state.params_D
            if not np.isfinite(delta_D).all():
                raise ValueError("the model has infinite or NaN values")
        except (ValueError, KeyError, TypeError) as error:
            return Failure(client=node, stage=FailureStage.UPDATE, reason=f"{error}")
        return Updates(
            clients_K=np.array([node]),
            delta_KD=delta_D[None],
            num_examples_K=np.array([count]),
            num_steps_K=np.zeros(1, np.int64),
        )

    def _nodes(self, grid: Grid) -> list[int]:
        """Wait for ``min_available_nodes`` nodes, and return the ids of all available nodes.

        Raises:
            FedlearnError: the deadline passes with fewer nodes.
        """
        deadline = time.monotonic() + self.timeout
        while len(nodes := sorted(grid.get_node_ids())) < self.min_available_nodes:
            if time.monotonic() > deadline:
                raise FedlearnError(
                    f"{len(nodes)} nodes are connected after {self.timeout:g} s\n"
                    f"  expected  min_available_nodes={self.min_available_nodes} or more\n"
                    f"  advice    a larger timeout_s, or min_available_nodes={max(1, len(nodes))}"
                )
            time.sleep(0.2)
        return nodes
