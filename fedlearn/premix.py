"""What mixes updates before a robust rule sees them, whichever rule that is.

Shapes: K clients, M mixtures of their updates, D parameters laid flat.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from array_api_compat import array_namespace

from fedlearn.aggregate import kept, updates_of
from fedlearn.errors import require
from fedlearn.records import Array, Memory, Updates
from fedlearn.seeds import Purpose, generator
from fedlearn.select import uniform
from fedlearn.strategy import Strategy
from fedlearn.transform import Context, Stage

Weights = Callable[[Updates, Context], np.ndarray]  # M x K, each row sums to one


def premixed(weights: Weights, rule: Strategy, *, clients_per_round: int | None = None) -> Strategy:
    """``rule``, whose aggregator is given ``weights updates`` (M x D) in the place of the updates (K x D).

    Args:
        weights: from a round's updates to the matrix, M x K.
        rule: any strategy that makes its step of updates alone; all of its other parts stay as they are.
        clients_per_round: another cohort size than the rule has, drawn uniformly; None leaves it to the rule.

    *Guarantees*: beside the updates and their mixtures no further copy of the matrix is made.

    Raises:
        SettingError: the rule needs more than updates: clients' losses, one update that is the server's own, or the
            whole round, as those of Flower do.
    """
    of_updates = not rule.server.from_fold and not rule.local.compares and rule.root is None
    expected = "one that makes its step of updates alone: a mixture of them is nobody's, and tells no loss"
    fix = "strategy.rule._target_=strategies.krum   (strategy=flower goes without mixing)"
    require(of_updates, "strategy.rule", "one that needs more", expected, fix)
    *before, last = rule.stages or (Stage(),)
    through = last.server.update

    def update(update_D: Array, memory: Memory, context: Context) -> tuple[Array, Memory]:
        fold = rule.aggregate.init(context.fold["layout"])
        fold = rule.aggregate.add(fold, _mixtures(weights, updates_of(context), context))
        return through(rule.aggregate.done(fold), memory, replace(context, fold=fold))

    stages = (*before, last._replace(server=last.server._replace(update=update)))
    select = uniform(clients_per_round) if clients_per_round else rule.select
    return replace(rule, select=select, aggregate=kept(), stages=stages)


def shuffled(clients_K: np.ndarray, context: Context) -> np.ndarray:
    """Row numbers in random order, anew each round; it depends on who the clients are, not on how they are laid."""
    rng = generator(context.seed, Purpose.MIXING, round=context.round)
    if context.deployed:  # an order must not tell its readers who will be mixed with whom
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(32), "big")))
    return np.argsort(clients_K)[rng.permutation(len(clients_K))]


def _mixtures(weights: Weights, updates: Updates, context: Context) -> Updates:
    xp, updates_KD, weights_MK = array_namespace(updates.delta_KD), updates.delta_KD, weights(updates, context)
    mix_MK = xp.asarray(weights_MK, dtype=updates_KD.dtype, device=updates_KD.device)
    ones_M = np.ones(len(weights_MK), np.int64)
    nobody_M = -np.arange(1, len(weights_MK) + 1)  # a mixture is no client's update
    return Updates(clients_K=nobody_M, delta_KD=mix_MK @ updates_KD, num_examples_K=ones_M, num_steps_K=ones_M)
