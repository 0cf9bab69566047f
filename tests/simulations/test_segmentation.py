from __future__ import annotations

import numpy as np
import pytest
from needs import needs

import fedlearn
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import Examples
from fedlearn.errors import SettingError
from simulations.models import build_trainer

needs("torch", "jax")


def shapes(num_images=12, size=16):
    """Return images of noise with a bright square, and the pixels of the square."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.3, (num_images, size, size, 1)).astype(np.float32)
    y = np.zeros((num_images, size, size), np.int64)
    for image in range(num_images):
        top, left = rng.integers(0, size - 6, 2)
        y[image, top : top + 6, left : left + 6] = 1
    return x + y[..., None], y


def data_of(num_clients=2):
    x, y = shapes()
    rows = np.arange(len(x)) % num_clients
    return fedlearn.from_arrays(x, y, assignment=rows, task="segmentation", test_share=0.25)


def trained(framework, engine, rounds=3):
    data = data_of()
    trainer, _ = build_trainer("unet", data, input_shape=(16, 16, 1), framework=framework)
    strategy = fedlearn.Strategy(select=fedlearn.everyone(), aggregate=fedlearn.mean(), server=fedlearn.sgd(1.0))
    built = engine(data, trainer)
    state = fedlearn.start(strategy, trainer.init(1), built, seed=1)
    local = fedlearn.LocalSettings(batch_size=4, learning_rate=0.1)
    for done in fedlearn.federate(strategy, built, state, local=local, schedule=fedlearn.Schedule(rounds=rounds)):
        state = done.state
    return np.asarray(state.params_D)


def test_a_unet_has_the_same_outputs_in_both_frameworks():
    data = data_of()
    x = data.train(0).x
    trainers = [build_trainer("unet", data, input_shape=(16, 16, 1), framework=name)[0] for name in ("torch", "jax")]
    params_D = trainers[0].init(3)
    first, second = (trainer.predict(params_D, x) for trainer in trainers)
    assert first.shape == (len(x), 2, 16, 16)
    assert trainers[0].layout.digest == trainers[1].layout.digest
    np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.mark.slow
def test_segmentation_trains_equally_in_all_engines_and_frameworks():
    serial, vector = (trained("torch", engine) for engine in (fedlearn.serial, fedlearn.vector))
    np.testing.assert_array_equal(serial, vector)
    np.testing.assert_allclose(trained("jax", fedlearn.vector), serial, atol=1e-4)


@pytest.mark.parametrize(("task", "model"), [("segmentation", "mlp"), ("multiclass", "unet")])
def test_a_model_that_does_not_fit_the_task_is_refused(task, model):
    empty = Examples(np.zeros((0, 16, 16, 1)), np.zeros(0))
    data = FederatedData(task=task, clients=(), train=lambda client: empty, test=lambda client: empty)
    with pytest.raises(SettingError, match="model is"):
        build_trainer(model, data, input_shape=(16, 16, 1))
