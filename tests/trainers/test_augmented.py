"""Images are augmented anew in each round, and all frameworks see the same ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.records import ClientWork, LocalSettings, Request
from fedlearn.data.from_arrays import from_arrays
from fedlearn.errors import SettingError
from fedlearn.trainers.augmentation import Augmentation, AugmentedTrainer, augment
from fedlearn.trainers.mixed import MixedTrainer
from simulations.models import build_trainer

SHAPE = (9, 8, 2)
AS_IT_IS = Augmentation(flip=False, shift=0, rotation=0)


def images(num_images=30):
    return np.random.default_rng(0).random((num_images, *SHAPE), dtype=np.float32)


def rng(seed=1):
    return np.random.default_rng(seed)


def test_nothing_asked_for_changes_nothing():
    np.testing.assert_array_equal(augment(images(), AS_IT_IS, rng()), images())


def test_a_flip_turns_about_half_of_the_images_around():
    before = images(200)
    after = augment(before, Augmentation(flip=True, shift=0, rotation=0), rng())
    kept = (after == before).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(after[~kept], before[~kept, :, ::-1])
    assert 70 < kept.sum() < 130


def test_a_shift_moves_whole_pixels_and_leaves_black_behind():
    before, seen = images(400), set()
    for image, moved in zip(before, augment(before, Augmentation(flip=False, shift=1, rotation=0), rng()), strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        places = [(i, j) for i in range(3) for j in range(3) if np.array_equal(padded[i : i + 9, j : j + 8], moved)]
        seen.update(places)
        assert len(places) == 1
    assert len(seen) == 9


def test_a_rotation_goes_both_ways_about_the_centre_and_no_further_than_asked():
    dot = np.zeros((300, 41, 41, 1), np.float32)
    dot[:, 20, 35] = 1  # 15 pixels to the right of the center
    turned = augment(dot, Augmentation(flip=False, shift=0, rotation=15), rng())[..., 0]
    rows, columns = np.mgrid[:41, :41]
    mass = turned.sum(axis=(1, 2))
    down, right = ((turned * at).sum(axis=(1, 2)) / mass - 20 for at in (rows, columns))
    angle = np.rad2deg(np.arctan2(down, right))
    np.testing.assert_allclose(np.hypot(down, right), 15, atol=0.3)
    assert -16 < angle.min() < -13 < 13 < angle.max() < 16


@given(seed=st.integers(0, 1000), few=st.integers(1, 29))
@settings(max_examples=20, deadline=None)
def test_what_happens_to_an_image_does_not_depend_on_the_others(seed, few):
    how = Augmentation(shift=2, rotation=30)
    np.testing.assert_array_equal(augment(images()[:few], how, rng(seed)), augment(images(), how, rng(seed))[:few])


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_no_pixel_leaves_the_range_of_the_image_and_of_black(seed):
    after = augment(images(), Augmentation(), rng(seed))
    assert after.dtype == np.float32
    assert after.min() >= 0
    assert after.max() <= images().max() + 1e-6


@pytest.mark.parametrize(("name", "value"), [("shift", -1), ("shift", 1.5), ("rotation", -1), ("rotation", 181)])
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(SettingError) as caught:
        Augmentation(**{name: value})
    assert caught.value.setting == name


@pytest.fixture(scope="module")
def data():
    return from_arrays(images(), np.arange(30) % 3, assignment=np.arange(30) % 2, task="multiclass", test_share=0)


def of(framework, data, how):
    return AugmentedTrainer(build_trainer("mlp", data, input_shape=SHAPE, framework=framework)[0], how)


def fit(built, data, *, clients=(0, 1), round=1):
    order = Request(round=round, seed=1, params_D=built.init(1), local=LocalSettings(batch_size=4))
    return np.asarray(
        built.fit(order, plain_training, [ClientWork(client=k, examples=data.train(k)) for k in clients]).delta_KD
    )


def test_both_frameworks_train_on_the_same_pixels(data):
    pytest.importorskip("torch")
    pytest.importorskip("flax")
    how = Augmentation(shift=2)
    item, other = (of(framework, data, how) for framework in ("torch", "jax"))
    np.testing.assert_allclose(fit(item, data), fit(other, data), atol=1e-5)
    mixed = AugmentedTrainer(MixedTrainer([item.trainer, other.trainer]), how)
    np.testing.assert_array_equal(fit(mixed, data)[0], fit(item, data)[0])


def test_a_client_trains_alike_alone_and_among_others_and_differently_in_each_round(data):
    pytest.importorskip("torch")
    built = of("torch", data, Augmentation(shift=2))
    np.testing.assert_array_equal(fit(built, data)[1], fit(built, data, clients=(1,))[0])
    assert np.abs(fit(built, data) - fit(built, data, round=2)).max() > 1e-4


def test_without_distortion_it_is_the_trainer_itself_and_it_predicts_as_that_does(data):
    pytest.importorskip("torch")
    bare = build_trainer("mlp", data, input_shape=SHAPE)[0]
    np.testing.assert_array_equal(fit(AugmentedTrainer(bare, AS_IT_IS), data), fit(bare, data))
    x, params = data.train(0).x, bare.init(1)
    np.testing.assert_array_equal(AugmentedTrainer(bare, Augmentation()).predict(params, x), bare.predict(params, x))
