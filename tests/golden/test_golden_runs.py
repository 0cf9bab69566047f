"""Runs whose end is known: a change here means that published results can no longer be had again.

The NumPy trainer is used, so that no framework's arithmetic is in the numbers; parameters are compared to six digits,
since the last one belongs to the processor.
"""

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, Schedule, federate, serial, start
from fedlearn.testing import LinearTrainer, linear_problem

GOLDEN = {
    "fedadagrad": [-0.016865, 0.812971, 0.0751344, 0.848432],
    "fedadam": [-0.0526158, 0.6765449, -0.2354932, 0.6849136],
    "fedavg": [-0.0353213, 0.9032964, 1.39069, 0.876543],
    "fedavgm": [0.0886472, 1.0430534, 2.1216557, 0.8401373],
    "fedprox": [-0.0346479, 0.9024022, 1.3866981, 0.8746572],
    "fedyogi": [-0.0522632, 0.6742717, -0.2375955, 0.6828741],
}


@pytest.mark.parametrize("name", strategies.__all__)
def test_a_golden_run_ends_where_it_always_did(name):
    trainer = LinearTrainer(3)
    engine = serial(linear_problem(), trainer)
    strategy = getattr(strategies, name)(clients_per_round=4)
    state = start(strategy, trainer.init(1), engine, seed=1)
    local = LocalSettings(epochs=2, batch_size=4, learning_rate=0.05)
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=10), local=local):
        state = done.state
    assert np.allclose(state.params_D, GOLDEN[name], rtol=0, atol=2e-6), state.params_D.tolist()
