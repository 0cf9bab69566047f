"""What mixes updates before a robust rule sees them, whichever rule that is.

Shapes: K clients, M mixtures of their updates, D parameters laid flat.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from array_api_compat import array_namespace

from fedlearn.algorithm.aggregation import collect_updates, collected_updates
from fedlearn.algorithm.client_selection import uniform
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Context, Stage
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Array, State, Updates
from fedlearn.errors import require

MixingWeights = Callable[[Updates, Context], np.ndarray]  # M x K, each row sums to one


def with_pre_aggregation(
    mixing_weights: MixingWeights, rule: Strategy, *, clients_per_round: int | None = None
) -> Strategy:
    """``rule``, whose aggregator is given ``weights updates`` (M x D) in the place of the updates (K x D).

    Args:
        mixing_weights: from a round's updates to the matrix, M x K.
        rule: any strategy that makes its step of updates alone; all of its other parts stay as they are.
        clients_per_round: another cohort size than the rule has, drawn uniformly; None leaves it to the rule.

    *Guarantees*: beside the updates and their mixtures no further copy of the matrix is made.

    Raises:
        SettingError: the rule needs more than updates: clients' losses, one update that is the server's own, or the
            whole round, as those of Flower do.
    """
    of_updates = not rule.server.needs_aggregator_state and not rule.local.evaluate_models and rule.root is None
    expected = "one that makes its step of updates alone: a mixture of them is nobody's, and tells no loss"
    fix = "strategy.rule._target_=strategies.krum   (strategy=flower goes without mixing)"
    require(of_updates, "strategy.rule", "one that needs more", expected, fix)
    *before, last = rule.stages or (Stage(),)
    through = last.server.update

    def update(update_D: Array, memory: State, context: Context) -> tuple[Array, State]:
        fold = rule.aggregate.init(context.aggregator_state["layout"])
        fold = rule.aggregate.add(fold, _mixtures(mixing_weights, collected_updates(context), context))
        return through(rule.aggregate.finalize(fold), memory, replace(context, aggregator_state=fold))

    stages = (*before, last._replace(server=last.server._replace(update=update)))
    select = uniform(clients_per_round) if clients_per_round else rule.select
    return replace(rule, select=select, aggregate=collect_updates(), stages=stages)


def random_permutation(clients_K: np.ndarray, context: Context) -> np.ndarray:
    """Row numbers in random order, anew each round; it depends on who the clients are, not on how they are laid."""
    rng = generator(context.seed, Purpose.MIXING, round=context.round)
    if context.deployed:  # an order must not tell its readers who will be mixed with whom
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(32), "big")))
    return np.argsort(clients_K)[rng.permutation(len(clients_K))]


def _mixtures(weights: MixingWeights, updates: Updates, context: Context) -> Updates:
    xp, updates_KD, weights_MK = array_namespace(updates.delta_KD), updates.delta_KD, weights(updates, context)
    mix_MK = xp.asarray(weights_MK, dtype=updates_KD.dtype, device=updates_KD.device)
    ones_M = np.ones(len(weights_MK), np.int64)
    nobody_M = -np.arange(1, len(weights_MK) + 1)  # a mixture is no client's update
    return Updates(clients_K=nobody_M, delta_KD=mix_MK @ updates_KD, num_examples_K=ones_M, num_steps_K=ones_M)
