"""Pre-aggregation: mix the updates of a round before a robust rule gets them.

Shapes: K clients, M mixtures of their updates, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from array_api_compat import array_namespace

from fedlearn.algorithm.aggregation import aggregate_updates, stacked
from fedlearn.algorithm.client_selection import uniform
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context
from fedlearn.core.records import Array, State, Updates
from fedlearn.errors import require

MixingWeights = Callable[[Updates, Context], np.ndarray]  # M x K, each row sums to one


def with_pre_aggregation(
    mixing_weights: MixingWeights, rule: Strategy, *, clients_per_round: int | None = None
) -> Strategy:
    """Return ``rule`` with an aggregator that receives ``weights updates`` (M x D) instead of the updates (K x D).

    Args:
        mixing_weights: ``(updates, context) -> weights``, M x K, rows that sum to one.
        rule: a strategy that needs no ids, metrics or extra vectors of single clients. Its other parts do not change.
        clients_per_round: cohort size, drawn uniformly; None keeps the selector of the rule.

    *Guarantees*: memory is that of the updates and their mixtures.

    Raises:
        SettingError: the rule reads ids, losses or extra vectors of single clients, or has a root dataset. A mixture
            has none of these.
    """
    is_strategy, fix = isinstance(rule, Strategy), "strategy.rule._target_=strategies.krum"
    require(is_strategy, "strategy.rule", rule, "null, or a strategy with a robust rule", fix)
    reads_clients = rule.aggregate.reads or rule.aggregate.client_models or rule.local.evaluate_models
    needs_updates_only = not reads_clients and rule.root is None
    expected = "a strategy that uses updates only, because a mixture of updates has no client id and no loss"
    require(needs_updates_only, "strategy.rule", "one that needs more", expected, fix)

    def mix_and_aggregate(updates: Updates, state: State, context: Context) -> tuple[Array, State]:
        mixtures = _mixtures(mixing_weights, updates, context)
        context = replace(context, clients_K=mixtures.clients_K, num_examples_K=mixtures.num_examples_K)
        return aggregate_updates(rule.aggregate, mixtures, state=state, context=context)

    select = uniform(clients_per_round) if clients_per_round else rule.select
    aggregate = stacked(mix_and_aggregate, init=rule.aggregate.init_state, broadcast=rule.aggregate.broadcast)
    return replace(rule, select=select, aggregate=aggregate)


def random_permutation(clients_K: np.ndarray, context: Context) -> np.ndarray:
    """Return row numbers in random order, drawn in each round (K).

    The order depends on client ids, not on the order of rows. In a deployment it is secret, so that malicious clients
    cannot predict the other updates of their mixture.
    """
    return np.argsort(clients_K)[context.random_generator().permutation(len(clients_K))]


def _mixtures(weights: MixingWeights, updates: Updates, context: Context) -> Updates:
    xp, updates_KD, weights_MK = array_namespace(updates.delta_KD), updates.delta_KD, weights(updates, context)
    mix_MK = xp.asarray(weights_MK, dtype=updates_KD.dtype, device=updates_KD.device)
    ones_M = np.ones(len(weights_MK), np.int64)
    no_client_M = -np.arange(1, len(weights_MK) + 1)  # a mixture is not the update of one client
    return Updates(clients_K=no_client_M, delta_KD=mix_MK @ updates_KD, num_examples_K=ones_M, num_steps_K=ones_M)
