"""A run on a GPU gives the model of the CPU, with data, blocks and aggregation on the device."""

import os
from dataclasses import replace

import numpy as np
import pytest

from fedlearn import LocalSettings, Schedule, federate, start, vector
from fedlearn.algorithm import plain_training
from fedlearn.core import Request
from fedlearn.core.records import ClientWork, ExampleDP
from fedlearn.testing import check_trainer
from simulations import models
from strategies import ditto, fedadam, fedlc, fedprox, fedrep, ifca, qfedavg, scaffold

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")


def has_gpu(framework):
    return torch.cuda.is_available() if framework == "torch" else bool(jax_gpus())


def jax_gpus():
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []


@pytest.fixture(params=["torch", "jax"])
def framework(request):
    if not has_gpu(request.param):
        pytest.skip(f"{request.param} has no GPU")
    return request.param


@pytest.fixture
def data(digits):
    from fedlearn.data.from_arrays import from_arrays

    x, y = digits
    return from_arrays(x[:600], y[:600], assignment=np.arange(600) % 12, task="multiclass")


def trainer(data, framework, device, model="mlp"):
    return models.build_trainer(model, data, input_shape=(8, 8, 1), framework=framework, device=device)[0]


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
def test_the_trainer_contract_holds_on_a_gpu(data, framework, model):
    clients = [data.train(client) for client in range(5)]
    check_trainer(trainer(data, framework, "cuda:0", model), clients, tolerance=1e-5)


STRATEGIES = {
    "fedprox": fedprox(mu=0.1),
    "fedadam": fedadam(learning_rate=0.03),
    "scaffold": scaffold(),
    "fedrep": fedrep(head_epochs=1),
    "ditto": ditto(),
    "fedlc": fedlc(),
    "qfedavg": qfedavg(),
    "ifca": ifca(),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_run_on_a_gpu_ends_where_one_on_the_cpu_does(data, framework, strategy):
    ends = []
    for device in ("cpu", "cuda:0"):
        engine = vector(data, trainer(data, framework, device))
        state = start(strategy, engine.trainer.init(1), engine, seed=1)
        for done in federate(strategy, engine, state, schedule=Schedule(rounds=10), local=LocalSettings(batch_size=16)):
            state = done.state
        ends.append(np.asarray(state.params_D.cpu() if hasattr(state.params_D, "cpu") else state.params_D))
        engine.close()
    assert np.abs(ends[0] - ends[1]).max() < 1e-4


def test_clipped_gradients_on_a_gpu_are_those_of_the_cpu(data, framework):
    deltas = []
    for device in ("cpu", "cuda:0"):
        built = trainer(data, framework, device)
        dp = ExampleDP(clip=0.5, noise_multiplier=0.0)
        order = Request(round=1, seed=1, params_D=built.init(1), local=LocalSettings(batch_size=16, example_dp=dp))
        work = [ClientWork(client=client, examples=data.train(client)) for client in range(4)]
        updates = replace(built.fit(order, plain_training, work), metrics={})
        deltas.append(np.asarray(updates.delta_KD.cpu() if hasattr(updates.delta_KD, "cpu") else updates.delta_KD))
    assert np.abs(deltas[0] - deltas[1]).max() < 1e-5


def test_jax_leaves_memory_of_a_gpu_to_others():
    import subprocess
    import sys

    if not has_gpu("jax"):
        pytest.skip("jax has no GPU")
    code = """
from omegaconf import OmegaConf
from fedlearn.runner.environment import set_environment
set_environment("jax")
import jax
device = jax.devices("cuda")[0]
jax.numpy.zeros(10, device=device).block_until_ready()
print(device.memory_stats()["pool_bytes"] < 2**30)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr


def test_torch_and_jax_multiply_in_one_precision_on_a_gpu(monkeypatch):
    from fedlearn.runner.environment import set_environment

    names = ("NVIDIA_TF32_OVERRIDE", "JAX_DEFAULT_MATMUL_PRECISION")
    for name in names:
        monkeypatch.setenv(name, "mine")
        monkeypatch.delenv(name)
    set_environment("jax")
    assert not set(names) & set(os.environ), "a run on a CPU needs no such setting"
    set_environment("jax", device="cuda:0")
    assert [os.environ[name] for name in names] == ["0", "highest"]
