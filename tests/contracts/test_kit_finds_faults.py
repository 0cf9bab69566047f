"""Each check of the conformance kit fails on a part that breaks its promise."""

from dataclasses import replace

import numpy as np
import pytest

from fedlearn import LocalRule, Selector, Strategy, Transform, everyone, mean, stacked
from fedlearn.algorithm import SamplingLaw, lookup_values, update_values
from fedlearn.testing import LinearTrainer, check_strategy, check_trainer, check_twins, linear_problem

CLIENTS = [linear_problem().train(k) for k in range(4)]


def broken(**parts):
    return Strategy(**{"select": everyone(), **parts})


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


def mean_of(updates, weights_K):
    rows_KD = np.asarray(updates.delta_KD)
    return np.asarray(weights_K / weights_K.sum(), np.float32) @ rows_KD


def counting_rule():
    rounds = []

    def rule(updates, state, context):
        rounds.append(1)
        return mean_of(updates, np.ones(len(updates))) / len(rounds), state

    return stacked(rule)


def alternating_rule():
    """Keep a count in an object array, which a checkpoint cannot contain."""
    return stacked(
        lambda updates, state, context: (mean_of(updates, np.ones(len(updates))), {"rounds": [context.round, "text"]})
    )


def random_rule():
    def rule(updates, state, context):
        return mean_of(updates, np.random.default_rng().uniform(0.5, 1, len(updates))), state

    return stacked(rule)


def rule_in_place(updates, state, context):
    updates.delta_KD[:] *= np.float32(0.5)
    return mean_of(updates, np.ones(len(updates))), state


def state_in_place():
    def rule(updates, state, context):
        state["v"] += mean_of(updates, np.ones(len(updates)))
        return np.array(state["v"]), state

    return stacked(rule, init=lambda layout: {"v": np.zeros(layout.num_parameters, np.float32)})


def rows_by_id(size=10):
    """Use client ids as row numbers of the state."""

    def rule(updates, state, context):
        trust_N = state["trust"].copy()
        trust_N[updates.clients_K] += 1
        return mean_of(updates, trust_N[updates.clients_K]), {"trust": trust_N}

    return stacked(rule, init=lambda layout: {"trust": np.ones(size)}, reads=("clients_K",))


def weights_by_id():
    return stacked(lambda updates, state, context: (mean_of(updates, 1.0 + updates.clients_K), state))


def trust_by_id(reads):
    """Store a state per client id correctly, but declare it only in ``reads``."""

    def rule(updates, state, context):
        trust_K = lookup_values(updates.clients_K, state["clients"], state["trust"], default=1)
        trust_K = trust_K + (np.arange(len(updates)) == np.argmax(np.asarray(updates.delta_KD)[:, 0]))
        new = {"clients": updates.clients_K, "trust": trust_K}
        return mean_of(updates, trust_K), update_values(state, new, key="clients")

    return stacked(rule, init=lambda layout: {"clients": np.zeros(0, np.int64), "trust": np.zeros(0)}, reads=reads)


def loss_rule(reads):
    return stacked(
        lambda updates, state, context: (mean_of(updates, updates.metrics["loss"].client_means()), state), reads=reads
    )


def claims(sensitivity, rule=lambda updates: np.ones(len(updates))):
    return stacked(lambda updates, state, context: (mean_of(updates, rule(updates)), state), sensitivity=sensitivity)


def optimizer_in_place():
    def update(update_D, memory, context):
        memory["v"] += np.asarray(update_D)
        return 0.1 * memory["v"], memory

    return Transform(update=update, init=lambda layout: {"v": np.zeros(layout.num_parameters, np.float32)})


def client_state_in_place(delta_KD, steps_K, rate, drift):
    drift += delta_KD
    return {"drift": drift}, {}


def selector(choose, **law):
    return Selector(choose=choose, law=SamplingLaw(**law) if law else None)


def draws_elsewhere(round, clients, rng):
    return np.random.default_rng().permutation(clients)[:4].tolist()


def halved(aggregator):
    return aggregator._replace(sensitivity=lambda clip, cohort: 0.5 * clip / cohort)


FAULTS = [
    (broken(server=remembers_outside()), "equal seeds"),
    (broken(aggregate=stacked(first_wins)), "order of clients"),
    (broken(aggregate=stacked(far_mean)), "zero updates"),
    (broken(aggregate=stacked(scalar_mean)), "shape"),
    (broken(aggregate=mean()._replace(merge=lambda item, other: item)), "merged"),
    (broken(aggregate=counting_rule()), "state in a closure"),
    (broken(aggregate=alternating_rule()), "named arrays of numbers"),
    (broken(aggregate=random_rule()), "no other random numbers"),
    (broken(aggregate=stacked(rule_in_place)), "in place: delta_KD"),
    (broken(aggregate=state_in_place()), "in place: state v"),
    (broken(aggregate=rows_by_id()), "ids as row numbers"),
    (broken(aggregate=rows_by_id(1000)), "ids as row numbers"),
    (broken(aggregate=weights_by_id()), r"uses client ids must declare reads=\('clients_K',\)"),
    (broken(aggregate=trust_by_id(())), r"declare reads=\('clients_K',\)"),
    (broken(aggregate=loss_rule(())), r"declare reads=\('metrics',\)"),
    (broken(aggregate=halved(mean(weighting="equal"))), "sensitivity"),
    (broken(aggregate=claims(lambda clip, cohort: 2 * clip / 12)), "sensitivity"),
    (broken(aggregate=claims(lambda clip, cohort: 2 * clip / cohort, lambda u: u.num_examples_K)), "sensitivity"),
    (broken(server=optimizer_in_place()), "state before it in place: server v"),
    (broken(local=LocalRule(client_state=("drift",), after_training=client_state_in_place)), "in place"),
    (broken(local=LocalRule(client_state=("drift",))), "client states"),
    (broken(local=LocalRule(correct=lambda g, w, w0: g * np.float32("inf"))), "failed"),
    (broken(local=LocalRule(correct=lambda g, w, w0: g if isinstance(g, np.ndarray) else 2 * g)), "same on"),
    (broken(select=selector(draws_elsewhere)), "draw"),
    (broken(select=selector(lambda round, clients, rng: [*clients][:4], kind="all")), "law that it states: all"),
    (broken(select=selector(lambda round, clients, rng: [*clients][:4], kind="fixed_size", size=4)), "probability"),
    (broken(select=selector(lambda round, clients, rng: [2, 2, 3])), "different clients"),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "promise"), FAULTS, ids=[promise for _, promise in FAULTS])
def test_a_broken_strategy_is_caught(strategy, promise):
    with pytest.raises(Exception, match=promise), np.errstate(all="ignore"):
        check_strategy(strategy)


@pytest.mark.parametrize(
    "aggregate",
    [trust_by_id(("clients_K",)), loss_rule(("metrics",)), claims(lambda clip, cohort: 2 * clip / cohort)],
)
def test_rules_that_declare_what_they_need_pass(aggregate):
    check_strategy(broken(aggregate=aggregate))


class IgnoresLocalRule(LinearTrainer):
    """Trains without the correction of the local rule."""

    def fit(self, order, rule, work):
        return super().fit(order, rule._replace(correct=lambda g, w, w0: g), work)


class MixesClients(LinearTrainer):
    """Lets one client see the client before it."""

    def fit(self, order, rule, work):
        updates = super().fit(order, rule, work)
        return replace(updates, delta_KD=np.cumsum(updates.delta_KD, axis=0))


class ChangesGlobalModel(LinearTrainer):
    """Changes the global model in place."""

    def fit(self, order, rule, work):
        order.params_D[0] += 1
        return super().fit(order, rule, work)


class IgnoresSeed(LinearTrainer):
    """Initializes the model at random, and ignores the seed."""

    def init(self, seed):
        return np.random.default_rng().normal(size=4).astype(np.float32)


class Constant(LinearTrainer):
    """Predicts without using its parameters."""

    def predict(self, params_D, x):
        return np.zeros((len(x), 1), np.float32)


class IgnoresRoundOfWork(LinearTrainer):
    """Ignores the rounds that the work of a block names."""

    def fit(self, order, rule, work):
        return super().fit(order, rule, [item._replace(round=None) for item in work])


@pytest.mark.parametrize(
    ("kind", "promise"),
    [
        (IgnoresLocalRule, "local rule"),
        (MixesClients, "its block"),
        (ChangesGlobalModel, "global model"),
        (IgnoresSeed, "function of the seed"),
        (Constant, "follow the parameters"),
        (IgnoresRoundOfWork, "the round of its ClientWork"),
    ],
)
def test_a_broken_trainer_is_caught(kind, promise):
    with pytest.raises(AssertionError, match=promise):
        check_trainer(kind(3), CLIENTS)


def test_twins_that_differ_are_caught():
    check_twins(LinearTrainer(3), LinearTrainer(3), CLIENTS)
    with pytest.raises(AssertionError, match="outputs"):
        check_twins(LinearTrainer(3), Constant(3), CLIENTS)
    with pytest.raises(AssertionError, match=r"layouts differ: out.weight\(1, 3\) and out.weight\(1, 2\)"):
        check_twins(LinearTrainer(3), LinearTrainer(2), CLIENTS)
