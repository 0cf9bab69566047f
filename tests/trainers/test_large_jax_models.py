"""A large JAX model is trained in several programs, with the bits of one program."""

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, Schedule, federate, from_arrays, start, vector
from fedlearn.algorithm import with_buffer_policy

pytest.importorskip("jax")
from flax import linen as nn

from fedlearn.trainers.jax import JaxTrainer, local_steps


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(4, (3, 3))(x.reshape(-1, 6, 6, 1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


STRATEGIES = {
    "mean": (strategies.fedavg(), {}),
    "corrected gradients": (strategies.scaffold(), {}),
    "personal parameters": (strategies.fedper(personal_parameters=("*Dense*",)), {}),
    "kept momentum": (strategies.fedavg(), {"momentum": 0.9, "optimizer_state": "keep"}),
}


@pytest.mark.parametrize(("strategy", "local"), STRATEGIES.values(), ids=STRATEGIES)
def test_several_programs_have_the_bits_of_one(monkeypatch, strategy, local):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 36), dtype=np.float32), rng.integers(0, 3, 40)
    data = from_arrays(x, y, assignment=np.repeat(np.arange(4), 10), task="multiclass")

    def model_after_two_rounds():
        trainer = JaxTrainer(Network(), task="multiclass", input_shape=(36,))
        engine, averaging = vector(data, trainer), with_buffer_policy(strategy, trainer.layout, "average")
        state = start(averaging, trainer.init(1), engine, seed=1)
        settings = LocalSettings(batch_size=4, learning_rate=0.1, **local)
        *_, last = federate(averaging, engine, state, schedule=Schedule(rounds=2), local=settings)
        return np.asarray(last.state.params_D)

    monkeypatch.setattr(local_steps, "LARGE_MODEL", 2**40)
    expected = model_after_two_rounds()
    monkeypatch.setattr(local_steps, "LARGE_MODEL", 1)
    calls, write = [], local_steps.FlatModel.write_rows
    monkeypatch.setattr(local_steps.FlatModel, "write_rows", lambda *rest: calls.append(rest) or write(*rest))
    np.testing.assert_array_equal(model_after_two_rounds(), expected)
    assert calls
