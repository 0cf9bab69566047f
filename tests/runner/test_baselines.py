"""The baselines of a federation: the pooled model, and a separate model for each client."""

from dataclasses import replace

import numpy as np
import pytest

from fedlearn import Schedule, federate, judge, serial, start
from fedlearn.core.records import Examples, LocalSettings
from fedlearn.data.from_arrays import from_arrays
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.mechanisms.base import none
from fedlearn.runner.baselines import train_baselines
from fedlearn.runner.experiment import Experiment
from fedlearn.runner.plan import Plan
from fedlearn.testing import LinearTrainer
from strategies import fedavg

LOCAL = LocalSettings(epochs=2, batch_size=8, learning_rate=0.1)


def conflicting(num_clients=3, num_examples=40):
    """Return clients with different true weights, so that no common model suits them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_clients * num_examples, 3)).astype(np.float32)
    weights = rng.normal(size=(num_clients, 3))
    rows = np.split(np.arange(len(x)), num_clients)
    y = np.concatenate([x[current] @ weights[k] for k, current in enumerate(rows)]).astype(np.float32)
    return from_arrays(x, y, assignment=rows, task="regression", test_share=0.25, seed=1)


def experiment(data, *names, local=LOCAL, clients_per_round=None):
    scenario = Scenario(name="linear", data=data, trainer=LinearTrainer(3), model="linear")
    strategy = fedavg(clients_per_round=clients_per_round)
    plan = Plan(
        strategy=strategy,
        schedule=Schedule(rounds=5),
        local=local,
        privacy=none(),
        seed=1,
        baselines=names,
    )
    return Experiment(plan=plan, scenario=scenario, engine=serial(data, scenario.trainer))


def federated(data, local, rounds):
    trainer = LinearTrainer(3)
    scenario = Scenario(name="linear", data=data, trainer=trainer, model="linear")
    engine = serial(data, trainer)
    state = start(fedavg(), trainer.init(1), engine, seed=1)
    plan = Schedule(rounds=rounds)
    *_, last = federate(fedavg(), engine, state, schedule=plan, local=local, evaluate=judge(scenario))
    return last.evaluation


def pooled(part, data):
    all_of = [part(client) for client in data.clients]
    return Examples(np.concatenate([item.x for item in all_of]), np.concatenate([item.y for item in all_of]))


def test_central_is_the_federation_of_one_client_that_has_all_data():
    data = conflicting()
    together, held_out = (pooled(part, data) for part in (data.train, data.test))
    item = replace(data, clients=range(3, 4), train=lambda _: together, test=lambda _: held_out)
    expected = federated(item, replace(LOCAL, epochs=10), rounds=1)
    found = train_baselines(experiment(data, "central"), num_client_updates=15)
    assert found["central"]["test"]["rmse"] == pytest.approx(expected.pooled["rmse"], rel=1e-6)


def test_local_is_each_clients_own_model_on_its_own_held_out_examples():
    data = conflicting()
    found = train_baselines(experiment(data, "local"), num_client_updates=15)
    alone = []
    for client in data.clients:
        seen = federated(replace(data, clients=[client]), replace(LOCAL, epochs=10), rounds=1)
        alone.append(seen.pooled["rmse"])
    assert found["local"]["clients"]["rmse"]["mean"] == pytest.approx(np.mean(alone), rel=1e-6)


def test_where_clients_conflict_alone_is_better_than_together():
    found = train_baselines(experiment(conflicting(), "central", "local"), num_client_updates=30)
    assert found["local"]["test"]["rmse"] < 0.5 * found["central"]["test"]["rmse"]


@pytest.mark.parametrize("local", [LOCAL, replace(LOCAL, epochs=1, steps=8)], ids=["epochs", "steps"])
def test_the_budget_is_what_the_federation_has_used(local):
    seen = []

    class Counting(LinearTrainer):
        def fit(self, order, rule, work):
            updates = super().fit(order, rule, work)
            seen.append(int(updates.num_steps_K.sum()))
            return updates

    data = conflicting()
    built = experiment(data, "central", "local", local=local)
    built = replace(built, scenario=replace(built.scenario, trainer=Counting(3)))
    train_baselines(built, num_client_updates=6)  # two rounds of all clients
    steps = 2 * sum(int(local.num_steps(len(data.train(client)))) for client in data.clients)
    central, alone = seen
    assert alone == steps
    assert central == pytest.approx(steps, rel=0.1)  # a pass over the pooled examples has fewer incomplete batches


def test_what_is_stopped_is_left_out():
    assert train_baselines(experiment(conflicting(), "central"), num_client_updates=6, should_stop=lambda: True) == {}
