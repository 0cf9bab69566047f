"""Networks of published experiments have the published sizes, and are equal in both frameworks."""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.records import ClientWork, LocalSettings, Request
from fedlearn.data.from_arrays import from_arrays
from fedlearn.errors import SettingError
from simulations.models import build_trainer
from simulations.models.published import NETWORKS, Dropout

needs("torch", "flax")

NUM_PARAMETERS = {  # stated by the papers, or counted in their code
    "mcmahan_2nn": 199_210,
    "mcmahan_cnn": 1_663_370,
    "opacus_cnn": 26_010,
    "niid_bench_cnn": 44_426,
    "pfllib_cnn": 582_026,
    "pfl_research_cnn": 1_626_442,
}
SHAPES = {"pfl_research_cnn": (32, 32, 3)}


def images(shape, num_examples=12):
    rng = np.random.default_rng(0)
    x = rng.random((num_examples, *shape), dtype=np.float32)
    return from_arrays(
        x, np.arange(num_examples) % 10, assignment=np.zeros(num_examples, int), task="multiclass", test_share=0
    )


FAST = ("mcmahan_2nn",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_a_network_has_the_published_size_and_is_equal_in_both_frameworks(name):
    shape = SHAPES.get(name, (28, 28, 1))
    data = images(shape)
    (torch_trainer, line), (jax_trainer, _) = (
        build_trainer(name, data, input_shape=shape, framework=framework) for framework in ("torch", "jax")
    )
    params_D, x = torch_trainer.init(3), data.train(0).x
    assert torch_trainer.layout.num_parameters == NUM_PARAMETERS[name]
    assert torch_trainer.layout == jax_trainer.layout
    assert line.startswith(f"{name} {'x'.join(map(str, shape))}-")
    assert line.endswith("-10")
    np.testing.assert_allclose(torch_trainer.predict(params_D, x), jax_trainer.predict(params_D, x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mcmahan_2nn", "opacus_cnn"])
def test_a_step_is_equal_in_both_frameworks(name):
    data, local = images((28, 28, 1)), LocalSettings(steps=2, batch_size=6, learning_rate=0.1)
    updates = []
    for framework in ("torch", "jax"):
        trainer, _ = build_trainer(name, data, input_shape=(28, 28, 1), framework=framework)
        request = Request(round=1, seed=1, params_D=trainer.init(3), local=local)
        work = [ClientWork(client=0, examples=data.train(0))]
        updates.append(np.asarray(trainer.fit(request, plain_training, work).delta_KD))
    assert np.abs(updates[0]).max() > 1e-3
    np.testing.assert_allclose(*updates, atol=1e-4)


@pytest.mark.slow
def test_dropout_is_in_training_only():
    data = images((8, 8, 3))
    trainer, _ = build_trainer("pfl_research_cnn", data, input_shape=(8, 8, 3))
    assert any(isinstance(layer, Dropout) for layer in NETWORKS["pfl_research_cnn"])
    params_D, x = trainer.init(1), data.train(0).x
    assert np.array_equal(trainer.predict(params_D, x), trainer.predict(params_D, x))


@pytest.mark.parametrize("shape", [(784,), (3, 28, 1)])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mcmahan_2nn"])
def test_a_network_refuses_examples_that_are_no_images_or_too_small(name, shape):
    with pytest.raises(SettingError, match="not images, or too small"):
        build_trainer(name, images(shape), input_shape=shape)
