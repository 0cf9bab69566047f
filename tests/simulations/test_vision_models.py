"""Networks for images: equal in both frameworks, and trained with DP-SGD."""

from __future__ import annotations

import numpy as np
import pytest

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.records import ClientWork, ExampleDP, LocalSettings, Request
from fedlearn.data.from_arrays import from_arrays
from fedlearn.errors import SettingError
from simulations.models import build_trainer, vision

torch = pytest.importorskip("torch")
NUM_PARAMETERS = {"gn_cnn": 29_290, "lenet": 61_706, "vgg": 147_386, "resnet8": 77_898, "resnet20": 272_778}
WITH_STATISTICS = {"bn_cnn": ("gn_cnn", 112), "resnet8_bn": ("resnet8", 240), "resnet20_bn": ("resnet20", 688)}
NUM_PARAMETERS |= {name: NUM_PARAMETERS[twin] + 2 * channels for name, (twin, channels) in WITH_STATISTICS.items()}


def images(shape, num_examples=12, task="multiclass"):
    rng = np.random.default_rng(0)
    x = rng.random((num_examples, *shape), dtype=np.float32)
    return from_arrays(x, np.arange(num_examples) % 10, assignment=np.zeros(num_examples, int), task=task, test_share=0)


def twins(model, data, shape):
    pytest.importorskip("flax")
    return [build_trainer(model, data, input_shape=shape, framework=framework)[0] for framework in ("torch", "jax")]


def deltas(built, data, **local):
    for item in built:
        settings = LocalSettings(batch_size=5, learning_rate=0.1, **local)
        order = Request(round=1, seed=1, params_D=item.init(3), local=settings)
        yield np.asarray(item.fit(order, plain_training, [ClientWork(client=0, examples=data.train(0))]).delta_KD)


@pytest.mark.parametrize("model", ["lenet", "vgg", "resnet8"])
def test_twins_are_one_network_on_images_of_odd_sizes(model):
    shape = (13, 15, 3)
    data = images(shape)
    torch_one, jax_one = twins(model, data, shape)
    params, x = torch_one.init(3), data.train(0).x
    assert torch_one.layout == jax_one.layout
    np.testing.assert_allclose(torch_one.predict(params, x), jax_one.predict(params, x), atol=1e-5)


@pytest.mark.slow
def test_twins_learn_alike():
    data = images((8, 8, 1))
    item, other = deltas(twins("resnet8_bn", data, (8, 8, 1)), data)
    assert np.abs(item).max() > 1e-3
    np.testing.assert_allclose(item, other, atol=1e-5)


@pytest.mark.parametrize("model", ["gn_cnn", "resnet8"])
def test_clipped_gradients_of_networks_with_group_norm_are_those_of_a_loop_over_examples(model):
    from fedlearn.trainers.torch.dp_sgd import ClippedGradient

    data = images((8, 8, 1))
    built, _ = build_trainer(model, data, input_shape=(8, 8, 1))
    x, y = torch.from_numpy(data.train(0).x), torch.from_numpy(data.train(0).y)
    leaves = [p for _, p in sorted(built.module.named_parameters())]
    clipped = ClippedGradient(built.module, built.loss, leaves, clip=0.5)
    sums, _ = clipped(x, y)
    assert clipped.method in ("graph", "vmap")  # no gradient of the whole network for each example
    expected = [torch.zeros_like(leaf) for leaf in leaves]
    for n in range(len(y)):
        current = torch.autograd.grad(built.loss(built.module(x[n : n + 1]), y[n : n + 1]).sum(), leaves)
        factor = min(1.0, 0.5 / float(torch.sqrt(sum(g.square().sum() for g in current))))
        expected = [total + factor * g for total, g in zip(expected, current, strict=True)]
    for total, wanted in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, wanted, atol=1e-5, rtol=1e-4)


def test_twins_with_group_norm_clip_alike():
    data = images((8, 8, 1))
    dp = ExampleDP(clip=0.5, noise_multiplier=0.0)
    item, other = deltas(twins("gn_cnn", data, (8, 8, 1)), data, example_dp=dp)
    assert np.abs(item).max() > 1e-3
    np.testing.assert_allclose(item, other, atol=1e-5)


@pytest.mark.parametrize("model", vision.MIN_IMAGE_SIZE)
def test_a_network_has_its_size_and_says_its_shape(model):
    built, line = build_trainer(model, images((28, 28, 1)), input_shape=(28, 28, 1))
    assert built.layout.num_parameters == NUM_PARAMETERS[model]
    assert line.startswith(f"{model} 28x28x1-")


@pytest.mark.parametrize("model", vision.MIN_IMAGE_SIZE)
@pytest.mark.parametrize("shape", [(784,), (3, 28, 1)])
def test_a_network_refuses_what_it_cannot_see(model, shape):
    with pytest.raises(SettingError, match="not images of"):
        build_trainer(model, images(shape), input_shape=shape)


@pytest.mark.parametrize("model", vision.MIN_IMAGE_SIZE)
def test_the_smallest_images_pass_through(model):
    shape = (vision.MIN_IMAGE_SIZE[model],) * 2 + (1,)
    built, _ = build_trainer(model, images(shape), input_shape=shape)
    assert built.predict(built.init(1), images(shape).train(0).x).shape == (12, 10)
