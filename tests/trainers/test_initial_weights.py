"""Trainers keep given weights, and do not change the state of the process."""

from __future__ import annotations

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")

import jax  # noqa: E402
from flax import linen  # noqa: E402

from fedlearn.core.layout import default_initial_parameters  # noqa: E402
from fedlearn.data.from_arrays import from_arrays  # noqa: E402
from fedlearn.errors import SettingError  # noqa: E402
from fedlearn.runner.instantiation import build  # noqa: E402
from fedlearn.trainers.base import FROM_MODULE, FROM_SEED  # noqa: E402
from fedlearn.trainers.jax import JaxTrainer  # noqa: E402
from fedlearn.trainers.torch import TorchTrainer  # noqa: E402
from simulations.models import build_trainer  # noqa: E402


def module(value=7.0):
    built = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    with torch.no_grad():
        for tensor in [*built.parameters(), *(b for b in built.buffers() if b.is_floating_point())]:
            tensor.fill_(value)
    return built


def data():
    rng = np.random.default_rng(0)
    return from_arrays(
        rng.normal(size=(20, 4)).astype(np.float32), np.arange(20) % 2, assignment=np.arange(20) % 3, task="binary"
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_a_given_torch_module_keeps_its_weights_and_statistics(seed):
    built = TorchTrainer(module(), task="binary")
    assert (built.init(seed) == 7.0).all()
    assert built.initialization == FROM_MODULE
    drawn = TorchTrainer(module(), task="binary", initial=default_initial_parameters)
    assert not (drawn.init(seed)[built.layout.slices["0.weight"]] == 7.0).any()
    assert drawn.initialization == FROM_SEED


def test_a_module_that_a_scenario_is_given_keeps_its_weights_and_a_named_model_draws_them():
    given, _ = build_trainer(torch.nn.Linear(4, 1), data(), input_shape=(4,))
    assert given.initialization == FROM_MODULE
    named, _ = build_trainer("linear", data(), input_shape=(4,))
    twin, _ = build_trainer("linear", data(), input_shape=(4,), framework="jax")
    assert named.initialization == twin.initialization == FROM_SEED
    assert np.array_equal(named.init(3), twin.init(3))


def test_given_flax_variables_are_kept_on_torch_s_axes():
    net = linen.Sequential([linen.Dense(3), linen.BatchNorm(use_running_average=True), linen.Dense(1)])
    variables = net.init(jax.random.key(5), np.zeros((1, 4), np.float32))
    built = JaxTrainer(net, task="binary", input_shape=(4,), variables=variables)
    assert built.initialization == FROM_MODULE
    found = built.layout.unpack(built.init(9))
    kernel = np.asarray(variables["params"]["layers_0"]["kernel"])
    assert np.array_equal(found["layers_0.weight"], kernel.T)
    x = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    assert np.allclose(built.predict(built.init(9), x), net.apply(variables, x), atol=1e-6)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_flax_variables_of_another_module_are_refused_by_the_first_leaf_that_differs(change):
    net = linen.Dense(1)
    kernel = {"kernel": np.zeros((5, 1))} if change == "shape" else {}
    with pytest.raises(SettingError, match=r"kernel, as module\.init returns it"):
        JaxTrainer(net, task="binary", input_shape=(4,), variables={"params": {"bias": np.zeros(1), **kernel}})


def test_a_trainer_changes_neither_threads_nor_environment_nor_the_global_generator(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda *args: pytest.fail("a trainer changes the memory allocator"))
    threads, environment = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(2)
    try:
        given, state = module(), torch.get_rng_state()
        built = TorchTrainer(given, task="binary")
        JaxTrainer(linen.Dense(1), task="binary", input_shape=(4,))
        built.predict(built.init(1), np.zeros((3, 4), np.float32))
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)
    assert dict(os.environ) == environment


def scenario(seed):
    model = {"_target_": "torch.nn.Linear", "in_features": 10, "out_features": 1}
    settings = {"_target_": "simulations.scenarios.diabetes.diabetes", "model": model, "seed": seed}
    return build(settings, "scenario", allow=["torch"]).trainer.init(0)


def test_a_module_that_the_configuration_builds_has_the_weights_of_the_seed_in_every_process():
    state = torch.get_rng_state()
    first, second, other = scenario(1), scenario(1), scenario(2)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
