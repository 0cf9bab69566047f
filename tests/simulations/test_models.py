from __future__ import annotations

import sys

import numpy as np
import pytest
from needs import needs

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.records import ClientWork, Examples, LocalSettings, Request
from fedlearn.data.from_arrays import from_arrays
from fedlearn.errors import MissingExtra, SettingError
from simulations.models import build_trainer

needs("torch")

IMAGES = [(8, 8, 1), (9, 7, 3)]


def images(shape, task="multiclass", num_examples=24):
    rng = np.random.default_rng(0)
    x = rng.random((num_examples, *shape), dtype=np.float32)
    y = rng.random(num_examples) if task == "regression" else np.arange(num_examples) % (2 if task == "binary" else 10)
    return from_arrays(x, y, assignment=np.zeros(num_examples, int), task=task, test_share=0)


def twins(model, data, shape):
    pytest.importorskip("flax")
    return [build_trainer(model, data, input_shape=shape, hidden=(5, 4), framework=f)[0] for f in ("torch", "jax")]


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
def test_twins_are_one_model(model, shape):
    data = images(shape)
    torch_one, jax_one = twins(model, data, shape)
    params = torch_one.init(3)
    x = data.train(0).x
    assert torch_one.layout == jax_one.layout
    assert np.array_equal(params, jax_one.init(3))
    np.testing.assert_allclose(torch_one.predict(params, x), jax_one.predict(params, x), atol=1e-5)


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("model", ["linear", "mlp", "cnn"])
def test_twins_learn_alike(model, task):
    data = images((8, 8, 1), task)
    local = LocalSettings(epochs=2, batch_size=7, learning_rate=0.1)
    deltas = []
    for item in twins(model, data, (8, 8, 1)):
        order = Request(round=1, seed=1, params_D=item.init(3), local=local)
        deltas.append(
            np.asarray(item.fit(order, plain_training, [ClientWork(client=0, examples=data.train(0))]).delta_KD)
        )
    assert np.abs(deltas[0]).max() > 1e-3
    np.testing.assert_allclose(*deltas, atol=1e-5)


def test_twins_learn_alike_on_flat_parts_of_an_image():
    data = images((8, 8, 1))
    flat = Examples(np.round(data.train(0).x), data.train(0).y)  # equal patches give ties in the 2 x 2 maximum
    deltas = []
    for item in twins("cnn", data, (8, 8, 1)):
        order = Request(round=1, seed=1, params_D=item.init(3), local=LocalSettings(batch_size=8))
        deltas.append(np.asarray(item.fit(order, plain_training, [ClientWork(client=0, examples=flat)]).delta_KD))
    np.testing.assert_allclose(*deltas, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "line", "num_parameters"),
    [("linear", "linear 64-10", 650), ("mlp", "mlp 64-32-10", 2410), ("cnn", "cnn 8x8x1-16-32-10", 6090)],
)
def test_the_line_says_the_shape(model, line, num_parameters):
    built, said = build_trainer(model, images((8, 8, 1)), input_shape=(8, 8, 1))
    assert said == line
    assert built.layout.num_parameters == num_parameters


@pytest.mark.parametrize(("task", "num_outputs"), [("binary", 1), ("multiclass", 10), ("regression", 1)])
def test_outputs_follow_the_task(task, num_outputs):
    data = images((4,), task)
    built, _ = build_trainer("linear", data, input_shape=(4,))
    assert built.predict(built.init(1), data.train(0).x).shape == (24, num_outputs)


def test_a_flax_module_of_ones_own_is_taken_as_it_is():
    linen = pytest.importorskip("flax.linen")
    built, line = build_trainer(linen.Dense(10), images((4,)), input_shape=(4,), framework="jax")
    assert line == "Dense"
    assert built.layout.num_parameters == 50


@pytest.mark.parametrize("model", ["mpl", 3, None, object()])
def test_an_unknown_model_is_named(model):
    with pytest.raises(SettingError) as caught:
        build_trainer(model, images((4,)), input_shape=(4,))
    assert caught.value.setting == "model"


def test_a_module_of_the_other_framework_is_refused():
    from torch import nn

    pytest.importorskip("flax")
    with pytest.raises(SettingError, match=r"a Linear\n.*chosen framework\n.*framework='torch'"):
        build_trainer(nn.Linear(4, 10), images((4,)), input_shape=(4,), framework="jax")


@pytest.mark.parametrize("shape", [(64,), (3, 8, 1), (8, 8)])
def test_a_cnn_needs_images(shape):
    with pytest.raises(SettingError, match="not images"):
        build_trainer("cnn", images(shape), input_shape=shape)


def test_an_absent_framework_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "simulations.models.basic.jax", raising=False)
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(MissingExtra, match=r"fedlearn\[jax\]"):
        build_trainer("mlp", images((4,)), input_shape=(4,), framework="jax")
