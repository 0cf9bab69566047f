from __future__ import annotations

import numpy as np
import pytest

from fedlearn import Layout, Schedule, federate, serial, start
from fedlearn.core.records import MetricSum, Updates
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer, linear_problem


class Sender(LinearTrainer):
    """A trainer whose clients send given updates."""

    def __init__(self, num_parameters: int, deltas) -> None:
        self.layout = Layout.from_shapes([("w", (num_parameters,))])
        self.deltas = deltas  # client -> delta_D, or an exception to raise

    def init(self, seed):
        return np.zeros(self.layout.num_parameters, np.float32)

    def fit(self, order, rule, work):
        sent = [self.deltas(item.client) for item in work]
        for delta in sent:
            if isinstance(delta, Exception):
                raise delta
        count = len(work)
        return Updates(
            clients_K=np.array([item.client for item in work]),
            delta_KD=np.stack(sent)[:, : self.layout.num_parameters].astype(np.float32),
            num_examples_K=np.array([len(item.examples) for item in work]),
            num_steps_K=np.ones(count, np.int64),
            metrics={"loss": MetricSum(np.ones(count), np.ones(count))},
        )


@pytest.fixture
def rounds_of():
    """Return a function that runs a protected strategy whose clients send given updates, and returns the rounds."""

    def run(mechanism, strategy, deltas, *, size=4, num_clients=10, rounds=1, engine=serial, seed=1, deployed=False):
        data, trainer = linear_problem(num_clients=num_clients), Sender(size, deltas)
        population = Population(
            clients=range(num_clients), rounds=rounds, num_examples_of=lambda client: len(data.train(client))
        )
        strategy, local = mechanism.protect(strategy, LOCAL_SETTINGS, population)
        built = engine(data, trainer)
        built.deployed = deployed
        state = start(strategy, trainer.init(1), built, seed=seed)
        schedule = Schedule(rounds=rounds, max_failures=0.9)
        return list(federate(strategy, built, state, schedule=schedule, local=local))

    return run
