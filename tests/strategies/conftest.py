"""Problems that are small enough to know the answer, and runs on them."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedlearn import Examples, FederatedData, LocalSettings, Scenario, Schedule, federate, judge, serial, start
from fedlearn.testing import LinearTrainer


def federation(clients):
    """Regression clients from ``(x, y)``, judged on what they train on."""
    held = [Examples(np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in clients]
    return FederatedData(
        task="regression", num_classes=1, clients=range(len(held)), train=held.__getitem__, test=held.__getitem__
    )


def two_clients(*, steepness=(1.0, 2.0), copies=(1, 1)):
    """One client wants a slope of 1 and the other of -1, where x has these sizes; both an offset of 0."""
    x = [np.array([[s], [-s]] * n) for s, n in zip(steepness, copies, strict=True)]
    return federation([(x[0], x[0][:, 0]), (x[1], -x[1][:, 0])])


def run(strategy, data, *, rounds, trainer=None, engine=None, **local):
    """The last round, and the engine with the clients' memories."""
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
    """``federation``, ``two_clients`` and ``run``."""
    return SimpleNamespace(federation=federation, two_clients=two_clients, run=run)
