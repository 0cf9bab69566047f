"""Runs whose end is known: a change here means that published results can no longer be had again.

The NumPy trainer is used, so that no framework's arithmetic is in the numbers; parameters are compared to six digits,
since the last one belongs to the processor.
"""

from inspect import signature

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, Schedule, federate, serial, start
from fedlearn.testing import LinearTrainer, linear_problem

GOLDEN = {
    "bulyan": [0.0034363, 0.9127325, 1.2995584, 0.8978847],
    "fcf": [0.0136504, 0.8346391, -0.0644955, 0.8290019],
    "fedadagrad": [0.0039588, 0.8072302, 0.071361, 0.8252558],
    "fedadam": [-0.0361343, 0.6721762, -0.2361612, 0.6791747],
    "fedavg": [-0.0158047, 0.9122686, 1.3967879, 0.8674117],
    "fedavgm": [0.074867, 1.0839438, 2.1424441, 0.7858396],
    "fedmedian": [0.00322, 0.8451567, 1.2574214, 0.862988],
    "fedper": [0.0136504, 0.9078064, 1.4046357, 0.8687826],
    "fedprox": [-0.0155408, 0.9120352, 1.3929322, 0.8655255],
    "fedtrimmedavg": [0.0034363, 0.9127325, 1.2995584, 0.8978847],
    "fedyogi": [-0.0357478, 0.6701317, -0.2382706, 0.6770204],
    "krum": [0.0347877, 0.9453849, 1.2444564, 0.701274],
}


@pytest.mark.parametrize("name", strategies.__all__)
def test_a_golden_run_ends_where_it_always_did(name):
    trainer = LinearTrainer(3)
    engine = serial(linear_problem(), trainer)
    builder = getattr(strategies, name)
    settings = {"clients_per_round": 4, "keeps": "out.bias"}
    taken = settings.keys() & signature(builder).parameters.keys()
    strategy = builder(**{setting: settings[setting] for setting in taken})
    state = start(strategy, trainer.init(1), engine, seed=1)
    local = LocalSettings(epochs=2, batch_size=4, learning_rate=0.05)
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=10), local=local):
        state = done.state
    assert np.allclose(state.params_D, GOLDEN[name], rtol=0, atol=2e-6), state.params_D.tolist()
