"""Small problems with known solutions, and runs on them."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedlearn import Examples, FederatedData, LocalSettings, Scenario, Schedule, federate, judge, serial, start
from fedlearn.testing import LinearTrainer


def federation(clients):
    """Return regression clients from ``(x, y)``, which are evaluated on their training examples."""
    held = [Examples(np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in clients]
    return FederatedData(
        task="regression", num_classes=1, clients=range(len(held)), train=held.__getitem__, test=held.__getitem__
    )


def two_clients(*, steepness=(1.0, 2.0), copies=(1, 1)):
    """Return one client with slope 1 and one with slope -1, for x of these sizes. Both have offset 0."""
    x = [np.array([[s], [-s]] * n) for s, n in zip(steepness, copies, strict=True)]
    return federation([(x[0], x[0][:, 0]), (x[1], -x[1][:, 0])])


def run(strategy, data, *, rounds, trainer=None, engine=None, **local):
    """Run a strategy; return the last round, and the engine with its client states."""
    trainer = trainer or LinearTrainer(data.train(0).x.shape[1])
    engine = (engine or serial)(data, trainer)
    state = start(strategy, trainer.init(1), engine, seed=1)
    settings = LocalSettings(**{"batch_size": 1000, "learning_rate": 0.05, **local})
    evaluate = judge(Scenario(name="small", data=data, trainer=trainer, model="linear"))
    schedule = Schedule(rounds=rounds, evaluate_every=rounds)
    *_, last = federate(strategy, engine, state, schedule=schedule, local=settings, evaluate=evaluate)
    return last, engine


@pytest.fixture
def small():
    """Return the three helpers of this module."""
    return SimpleNamespace(federation=federation, two_clients=two_clients, run=run)
