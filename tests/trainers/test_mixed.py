"""One model with some clients in torch and others in JAX."""

import sys

import numpy as np
import pytest
from needs import needs

from fedlearn import FedlearnError, LocalSettings, Schedule, federate, serial, start, vector
from fedlearn.algorithm import plain_training
from fedlearn.core import ClientWork, Request
from fedlearn.data.partition import Dirichlet
from fedlearn.testing import LinearTrainer
from fedlearn.trainers.mixed import MixedTrainer
from simulations.scenarios.digits import digits
from strategies import fedavg, fedprox

needs("torch", reason="the extra torch is not installed")
needs("jax", reason="the extra jax is not installed")

LOCAL = LocalSettings(batch_size=32, learning_rate=0.1)


def trained(framework, strategy, engine=vector, rounds=10):
    scenario = digits(framework=framework, partition=Dirichlet(num_clients=6))
    built = engine(scenario.data, scenario.trainer)
    state = start(strategy, scenario.trainer.init(1), built, seed=1)
    *_, last = federate(strategy, built, state, schedule=Schedule(rounds=rounds), local=LOCAL)
    return last.state.params_D


@pytest.mark.parametrize("strategy", [fedavg(), fedprox(mu=0.5)], ids=["fedavg", "fedprox"])
def test_a_mixed_federation_ends_within_1e_4_of_one_all_in_torch(strategy):
    assert np.abs(trained("mixed", strategy) - trained("torch", strategy)).max() < 1e-4


def test_engines_agree_on_a_mixed_federation():
    assert np.abs(trained("mixed", fedavg(), serial, 3) - trained("mixed", fedavg(), vector, 3)).max() < 1e-5


def test_each_client_trains_in_its_own_framework_whoever_else_is_in_the_block():
    scenario = digits(framework="mixed", partition=Dirichlet(num_clients=4))
    single, other = scenario.trainer.trainers
    order = Request(round=1, seed=1, params_D=scenario.trainer.init(1), local=LOCAL)
    work = [ClientWork(client=client, examples=scenario.data.train(client)) for client in (3, 0, 1)]
    mixed = scenario.trainer.fit(order, plain_training, work)
    assert mixed.clients_K.tolist() == [3, 0, 1]
    assert mixed.num_examples_K.tolist() == [len(item.examples) for item in work]
    for row, trainer in ((0, other), (1, single), (2, other)):
        alone = trainer.fit(order, plain_training, [work[row]])
        assert np.array_equal(np.asarray(alone.delta_KD)[0], mixed.delta_KD[row])
        assert alone.metrics["loss"].total_K[0] == mixed.metrics["loss"].total_K[row]
    assert {"torch", "jax"} <= sys.modules.keys()


def test_the_header_says_who_trains_how():
    assert "torch" in digits(framework="mixed", partition=Dirichlet(num_clients=4)).trainer.describe_batching(4, 100)


def test_trainers_of_different_models_do_not_mix():
    with pytest.raises(FedlearnError, match="different layouts"):
        MixedTrainer([LinearTrainer(3), LinearTrainer(4)])
