"""Several devices of JAX in one process share a block of clients, with the updates of one device."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")

CODE = """
import jax, numpy as np
from fedlearn import LocalSettings, Schedule, federate, from_arrays, start, vector
from simulations import models
from strategies import scaffold

assert len(jax.devices("cpu")) == 2
rng = np.random.default_rng(0)
x, y = rng.standard_normal((90, 8, 8, 1), dtype=np.float32), rng.integers(0, 3, 90)
data = from_arrays(x, y, assignment=np.arange(90) % 5, task="multiclass")
ends = []
for device in ("cpu:0", "cpu:all"):
    trainer = models.build_trainer("mlp", data, input_shape=(8, 8, 1), framework="jax", device=device)[0]
    engine = vector(data, trainer)
    state = start(scaffold(), trainer.init(1), engine, seed=1)
    for done in federate(scaffold(), engine, state, schedule=Schedule(rounds=3), local=LocalSettings(batch_size=8)):
        assert not done.failures, done.failures
        state = done.state
    ends.append(np.asarray(state.params_D))
    used = {device for device in trainer._shares._inputs}
assert used == {jax.devices("cpu")[1]}, used
print(abs(ends[0] - ends[1]).max())
"""


@pytest.mark.slow
@pytest.mark.process
def test_two_devices_train_the_model_of_one_device():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6
