"""A run with ``framework=jax`` trains in JAX, or is refused."""

import pytest

from fedlearn.runner.start import main

SCENARIO = """
import numpy as np
from torch import nn

import fedlearn


def ignores_framework(*, seed=1):
    x_N = np.random.default_rng(seed).normal(size=(40, 3))
    data = fedlearn.from_arrays(x_N, (x_N[:, 0] > 0).astype(int), assignment=np.arange(40) % 4, task="binary")
    return fedlearn.Scenario(name="mine", data=data, trainer=fedlearn.TorchTrainer(nn.Linear(3, 1), task="binary"))


def net():
    from flax import nnx

    return nnx.Linear(10, 1, rngs=nnx.Rngs(0))
"""
FILE = "# @package _global_\nscenario:\n  _target_: framework_code.ignores_framework\n  seed: ${seed}\n"
ALLOW = "allow_targets=[framework_code]"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "framework_code.py").write_text(SCENARIO)
    (tmp_path / "my_conf" / "scenario").mkdir(parents=True)
    (tmp_path / "my_conf" / "scenario" / "mine.yaml").write_text(FILE)
    return tmp_path


def test_a_scenario_that_trains_in_another_framework_is_refused(folder, capsys):
    words = ["--config-dir", "my_conf", "scenario=mine", "framework=jax", "rounds=1", ALLOW]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "framework is jax" in shown
    assert "torch, because the scenario mine trains a model of torch" in shown
    assert "try       framework=torch" in shown


@pytest.mark.slow
def test_a_module_of_nnx_trains_resumes_and_loads_from_its_folder(folder):
    import numpy as np

    import fedlearn
    from simulations.resume import main as resume

    pytest.importorskip("flax")
    words = ["scenario=diabetes", "model._target_=framework_code.net", "framework=jax", "report=false", ALLOW]
    assert main([*words, "rounds=4", "hydra.run.dir=whole"]) == 0
    assert main([*words, "rounds=2", "hydra.run.dir=part"]) == 0
    assert resume(["part", "rounds=4"]) == 0
    whole, part = (fedlearn.load(name, allow_targets=["framework_code"]) for name in ("whole", "part"))
    np.testing.assert_array_equal(whole.params_D, part.params_D)
    x = np.zeros((3, 10), np.float32)
    np.testing.assert_allclose(whole.module(x), whole.trainer.predict(whole.params_D, x), atol=1e-6)
