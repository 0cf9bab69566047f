"""Stop after five rounds, save a checkpoint, and resume. The model equals the model of an uninterrupted run."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import fedlearn
from fedlearn.core import checkpoint
from fedlearn.testing import LinearTrainer, linear_problem
from strategies import scaffold

data, trainer, strategy = linear_problem(), LinearTrainer(3), scaffold()
local = fedlearn.LocalSettings(learning_rate=0.05)


def run(engine, state, rounds):
    """Run until this round, and return the last state."""
    for round in fedlearn.federate(strategy, engine, state, schedule=fedlearn.Schedule(rounds=rounds), local=local):
        state = round.state
    return state


with TemporaryDirectory() as folder:
    engine = fedlearn.serial(data, trainer)
    half = run(engine, fedlearn.start(strategy, trainer.init(1), engine, seed=1), rounds=5)
    path = checkpoint.save(Path(folder), half, engine.client_states, layout=trainer.layout)

    resumed = fedlearn.serial(data, trainer)
    state, resumed.client_states = checkpoint.load(path, trainer.layout)
    last = run(resumed, state, rounds=10)

engine = fedlearn.serial(data, trainer)
whole = run(engine, fedlearn.start(strategy, trainer.init(1), engine, seed=1), rounds=10)
print("equal bit for bit:", np.array_equal(last.params_D, whole.params_D))
