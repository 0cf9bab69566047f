"""The conformance kit is worth what it catches: every check fails on a part that breaks its promise."""

from dataclasses import replace

import numpy as np
import pytest

from fedlearn import LocalRule, Strategy, Transform, everyone, mean, stacked
from fedlearn.testing import LinearTrainer, check_strategy, check_trainer, check_twins, linear_problem

CLIENTS = [linear_problem().train(k) for k in range(4)]


def broken(**parts):
    return Strategy(select=everyone(), **parts)


def remembers_outside():
    seen = []

    def update(update_D, memory, context):
        seen.append(1)
        return update_D * np.float32(1 / len(seen)), memory

    return Transform(update=update)


def first_wins(updates, state, context):
    return updates.delta_KD[0], state


def far_mean(updates, state, context):
    return updates.delta_KD.mean(0) + 1, state


def scalar_mean(updates, state, context):
    return updates.delta_KD.mean(), state


def doubling():
    return mean(weighting="equal")._replace(sensitivity=lambda clip, cohort: 0.5 * clip / cohort)


@pytest.mark.parametrize(
    ("strategy", "promise"),
    [
        (broken(server=remembers_outside()), "equal seeds"),
        (broken(aggregate=stacked(first_wins)), "order of clients"),
        (broken(aggregate=stacked(far_mean)), "zero updates"),
        (broken(aggregate=stacked(scalar_mean)), "shape"),
        (broken(aggregate=doubling()), "declared"),
        (broken(aggregate=mean()._replace(merge=lambda one, other: one)), "merged"),
        (broken(local=LocalRule(correct=lambda g, w, w0: g * np.float32("inf"))), "failed"),
        (broken(local=LocalRule(correct=lambda g, w, w0: g if isinstance(g, np.ndarray) else 2 * g)), "same on"),
    ],
)  # fmt: skip
def test_a_broken_strategy_is_caught(strategy, promise):
    with pytest.raises(Exception, match=promise), np.errstate(all="ignore"):
        check_strategy(strategy)


class Deaf(LinearTrainer):
    """Does not hear the local rule."""

    def fit(self, order, rule, work):
        return super().fit(order, rule._replace(correct=lambda g, w, w0: g), work)


class Leaky(LinearTrainer):
    """Lets one client see the one before it."""

    def fit(self, order, rule, work):
        updates = super().fit(order, rule, work)
        return replace(updates, delta_KD=np.cumsum(updates.delta_KD, axis=0))


class Meddling(LinearTrainer):
    """Changes the global model in place."""

    def fit(self, order, rule, work):
        order.params_D[0] += 1
        return super().fit(order, rule, work)


class Moody(LinearTrainer):
    """Starts anew each time."""

    def init(self, seed):
        return np.random.default_rng().normal(size=4).astype(np.float32)


class Constant(LinearTrainer):
    """Predicts without its parameters."""

    def predict(self, params_D, x):
        return np.zeros((len(x), 1), np.float32)


class Timeless(LinearTrainer):
    """Takes all of a block for clients of its own round."""

    def fit(self, order, rule, work):
        return super().fit(order, rule, [one._replace(round=None) for one in work])


@pytest.mark.parametrize(
    ("kind", "promise"),
    [
        (Deaf, "local rule"), (Leaky, "its block"), (Meddling, "global model"), (Moody, "function of the seed"),
        (Constant, "follow the parameters"), (Timeless, "the round that its work names"),
    ],
)  # fmt: skip
def test_a_broken_trainer_is_caught(kind, promise):
    with pytest.raises(AssertionError, match=promise):
        check_trainer(kind(3), CLIENTS)


def test_twins_that_differ_are_caught():
    check_twins(LinearTrainer(3), LinearTrainer(3), CLIENTS)
    with pytest.raises(AssertionError, match="outputs"):
        check_twins(LinearTrainer(3), Constant(3), CLIENTS)
    with pytest.raises(AssertionError, match=r"layouts differ: out.weight\(1, 3\) and out.weight\(1, 2\)"):
        check_twins(LinearTrainer(3), LinearTrainer(2), CLIENTS)
