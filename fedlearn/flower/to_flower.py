"""Our strategies, in a Flower ServerApp.

Shapes: K clients, D parameters laid flat.
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
from fedlearn.loop.training_loop import initial_server_state, server_step

log = logging.getLogger(__name__)


def to_flower(strategy: Strategy, *, seed: int = 1, timeout_s: float = 600.0, **settings: Any) -> FlowerStrategy:
    """One of our strategies, for a Flower ServerApp whose ClientApps send back arrays and a number of examples.

    Whom to ask, how to aggregate and how to step are the strategy's; evaluation is Flower's FedAvg's. Clients run the
    app's own code: a strategy with work to do there, or with a privacy claim that rests on it, cannot be had so. What
    the strategy remembers lives as long as this object, as with Flower's own.

    Args:
        strategy: with plain local training, and stages that work on the server only.
        seed: of the cohorts' draws.
        timeout_s: seconds to wait until there are ``min_available_nodes``, > 0.
        settings: of Flower's ``FedAvg``, but for ``fraction_train`` and ``min_train_nodes``, which are the strategy's.

    *Guarantees*: an error reply, a model that is not finite or of other names or shapes, or without examples, never
    touches the global model: it is logged and left out. Arrays keep their names, order and dtypes; they are averaged in
    float64 as float32.

    Raises:
        CompositionError: the strategy has work to do at clients, or claims privacy.
        SettingError: a setting is out of range.
    """
    _refuse_work_at_clients(strategy)
    require(is_count(seed, at_least=0), "seed", seed, "a whole number >= 0", "seed=1")
    ok = is_number(timeout_s, at_least=0) and timeout_s > 0
    require(ok, "timeout", timeout_s, "seconds, > 0", "timeout=600")
    for name in ("fraction_train", "min_train_nodes"):
        expected = "no such setting: the strategy itself says whom to ask"
        require(name not in settings, name, settings.get(name), expected, "uniform(clients_per_round)")
    return _Ours(strategy, seed=seed, timeout=timeout_s, **settings)


def _refuse_work_at_clients(strategy: Strategy) -> None:
    if strategy.local != plain_training:
        raise CompositionError(
            "the strategy changes how clients train, which a Flower ClientApp does as it will\n"
            "  try       LocalRule plain, and the change in the ClientApp itself"
        )
    if strategy.select.update is not None:
        raise CompositionError(
            "the strategy selects by what clients told before, which no Flower strategy is told of\n"
            "  try       select=uniform(clients_per_round)"
        )
    if set(strategy.aggregate.reads) & {"metrics", "extra"}:
        raise CompositionError(
            f"the aggregation rule reads {', '.join(strategy.aggregate.reads)}, but a ClientApp does not send that\n"
            "  try       a rule that reads updates and numbers of examples only"
        )
    if strategy.privacy_guarantee is not None or any(stage.event is not None for stage in strategy.stages):
        raise CompositionError(
            "the strategy claims privacy, which rests on bounds that nobody holds a ClientApp to\n"
            "  try       python -m fedlearn.deploy.submit, or Flower's own differential privacy strategies and mods"
        )
    for number, stage in enumerate(strategy.stages):
        if stage.client != identity or stage.codec is not None:
            raise CompositionError(
                f"stage {number} of the strategy works at clients, where a Flower ClientApp knows nothing of it\n"
                "  try       a Flower mod in the ClientApp, e.g. flwr.clientapp.mod.fixedclipping_mod, instead"
            )


class _Ours(FedAvg):
    """A strategy of ours as Flower calls it: `configure_train`, then `aggregate_train`, round after round."""

    def __init__(self, strategy: Strategy, *, seed: int, timeout: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.strategy, self.seed, self.timeout = strategy, seed, timeout
        self.state: ServerState | None = None
        self.sent, self.cohort, self.population = ArrayRecord(), 0, 0

    def summary(self) -> None:
        """What Flower logs at the start."""
        log.info("a strategy of fedlearn's, seed %d", self.seed)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to the cohort that the strategy selects."""
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
        """The new model, and the clients' training metrics."""
        assert self.state is not None, "configure_train comes first"
        layout = layout_from_record(self.sent)
        gathered, metrics = PartialAggregate(aggregator_state=self.strategy.aggregate.init(layout)), []
        for reply in sorted(replies, key=lambda one: one.metadata.src_node_id):
            result = self._update(reply, layout)
            if isinstance(result, Failure):
                log.warning("node %d is left out: %s", result.client, result.reason)
            else:
                metrics.append(reply.content)
            gathered = accumulate(gathered, self.strategy.aggregate, result)
        if not gathered.num_updates:
            return None, None
        context = Context(
            round=server_round,
            seed=self.seed,
            num_clients=self.population,
            cohort_size=self.cohort,
            params_D=self.state.params_D,
            layout=layout,
            deployed=True,  # nodes may be real ones: noise must not follow from the seed
        )
        aggregator = self.strategy.aggregate
        update_D, rule_state = aggregator.finish(gathered.aggregator_state, self.state.aggregate, context)
        params_D, server, stages = server_step(self.strategy, self.state, update_D, context, layout)
        self.state = replace(
            self.state, round=server_round, params_D=params_D, server=server, stages=stages, aggregate=rule_state
        )
        dtypes = {name: array.dtype for name, array in self.sent.items()}
        named = to_array_record(np.asarray(as_numpy(params_D)), layout, dtypes)
        new = ArrayRecord({name: named[name] for name in self.sent})
        return new, self.train_metrics_aggr_fn(metrics, self.weighted_by_key)

    def _update(self, reply: Message, layout: Layout) -> Updates | Failure:
        node = reply.metadata.src_node_id
        assert self.state is not None
        try:
            if reply.has_error():
                raise ValueError(reply.error.reason)
            (arrays,), (metrics,) = reply.content.array_records.values(), reply.content.metric_records.values()
            count = metrics[self.weighted_by_key]
            if not (isinstance(count, int | float) and 0 < count < float("inf")):
                raise ValueError(f"{self.weighted_by_key} is {count}, expected a number > 0")
            delta_D = params_from_record(arrays, layout) - self.state.params_D
            if not np.isfinite(delta_D).all():
                raise ValueError("its model is not finite")
        except (ValueError, KeyError, TypeError) as error:
            return Failure(client=node, stage=FailureStage.UPDATE, reason=f"{error}")
        return Updates(
            clients_K=np.array([node]),
            delta_KD=delta_D[None],
            num_examples_K=np.array([count]),
            num_steps_K=np.zeros(1, np.int64),
        )

    def _nodes(self, grid: Grid) -> list[int]:
        """The nodes that are there, as soon as there are enough.

        Raises:
            FedlearnError: there are not enough in time.
        """
        ends = time.monotonic() + self.timeout
        while len(nodes := sorted(grid.get_node_ids())) < self.min_available_nodes:
            if time.monotonic() > ends:
                needed = f"{self.min_available_nodes} are needed (min_available_nodes)"
                raise FedlearnError(f"{len(nodes)} nodes have come within {self.timeout:g} s, {needed}")
            time.sleep(0.2)
        return nodes
