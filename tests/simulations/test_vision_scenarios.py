"""X-rays, intensive care, MNIST and CIFAR-10: published files are read, and scenarios match their descriptions."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import struct
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from needs import needs

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.records import ClientWork, LocalSettings, Request
from fedlearn.data.download import DataSet, LocalCopy
from fedlearn.data.example_files import read_batches
from fedlearn.data.partition import Iid, Natural
from fedlearn.errors import DataError, SettingError
from fedlearn.testing import check_scenario
from simulations.datasets import cifar10 as cifar_images
from simulations.datasets import icu
from simulations.datasets import mnist as mnist_images
from simulations.datasets import pneumonia as x_rays
from simulations.datasets.idx import read_idx
from simulations.scenarios import pneumonia
from simulations.scenarios.cifar10 import cifar10
from simulations.scenarios.icu_mortality import PRIOR_MORTALITY, SCALES, icu_mortality
from simulations.scenarios.icu_mortality import scale_features as scaled_stays
from simulations.scenarios.mnist import mnist

needs("torch")

RNG = np.random.default_rng(0)
SHELF = Path(os.environ.get("FEDLEARN_DATA", Path(__file__).parents[3] / "shared" / "data"))


def read_examples(scenario, path):
    """Return the model inputs of a file of new examples."""
    return np.concatenate([batch.x for batch in read_batches(path, scenario.preprocessing.inputs, 1000)])


@pytest.fixture(autouse=True)
def nothing_but_fixtures(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDLEARN_DATA", raising=False)
    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path / "cache"))


def shelf(name):
    """Return the folder of a real data set, or skip if this machine lacks it."""
    if not (SHELF / name).is_dir():
        pytest.skip(f"{name} is not available (set FEDLEARN_DATA)")
    return SHELF / name


def of_files(folder, *names):
    """Return a data set of the files in a folder, verified by checksum."""
    checksums = {name: "sha256:" + hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    return DataSet(name="fixture", origins=(LocalCopy(files=checksums),))


def sizes(data):
    return [(len(data.train(client)), len(data.test(client))) for client in data.clients]


def rounds_in(scenario, num_rounds=2, num_clients=3):
    """Return the parameters after a few rounds of plain averaging over some clients, in the scenario's framework."""
    built, clients = scenario.trainer, [k for k in scenario.data.clients if len(scenario.data.train(k))][:num_clients]
    params = built.init(1)
    for number in range(1, num_rounds + 1):
        order = Request(round=number, seed=1, params_D=params, local=LocalSettings(steps=1, batch_size=4))
        work = [ClientWork(client=k, examples=scenario.data.train(k)) for k in clients]
        params = params + np.asarray(built.fit(order, plain_training, work).delta_KD).mean(axis=0)
    return params


# --- MNIST and data sets in its format


def idx(array):
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.tobytes(), mtime=0)


@pytest.fixture
def idx_folder(tmp_path):
    """Write sixty training and twenty test images under MNIST's official names."""
    for part, number in (("train", 60), ("t10k", 20)):
        images, labels = mnist_images.FILES[part]
        (tmp_path / images).write_bytes(idx(RNG.integers(0, 256, (number, 28, 28), np.uint8)))
        (tmp_path / labels).write_bytes(idx((np.arange(number) % 10).astype(np.uint8)))
    return tmp_path


def fashion_of(monkeypatch, folder):
    read = mnist_images._whole(of_files(folder, *(n for part in mnist_images.FILES.values() for n in part)), "Clothes")
    monkeypatch.setattr(mnist_images, "VARIANTS", {**mnist_images.VARIANTS, "fashion": read})


def test_idx_files_are_read_to_the_byte_gzipped_or_plain(tmp_path):
    array = RNG.integers(0, 256, (3, 4, 5), np.uint8)
    (tmp_path / "a.gz").write_bytes(idx(array))
    (tmp_path / "a").write_bytes(gzip.decompress(idx(array)))
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), array)
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), array)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"not gzip", "complete gzip"),
        (idx(np.zeros((2, 3), np.uint8))[:-9], "complete gzip"),
        (gzip.compress(b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"\0", mtime=0), "IDX file of bytes"),
        (gzip.compress(b"\0", mtime=0), "IDX file of bytes"),
        (gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 5) + b"\0\0", mtime=0), "has 2 values, but its shape is 5"),
    ],
)
def test_what_is_no_idx_file_is_refused(tmp_path, content, why):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(DataError, match=why):
        read_idx(tmp_path / "a.gz")


def test_a_set_in_the_official_layout_is_judged_on_its_official_test_part(idx_folder, monkeypatch):
    fashion_of(monkeypatch, idx_folder)
    scenario = mnist(variant="fashion", path=idx_folder, partition=Iid(num_clients=5))
    data = scenario.data
    assert scenario.model == "mlp 784-128-64-10"
    assert sizes(data) == [(10, 2)] * 5
    assert data.pooled_test().x.shape == (20, 28, 28, 1)
    assert data.pooled_test().y.tolist() == [*range(10)] * 2
    assert 0 <= data.train(0).x.min() < 0.05 < 0.95 < data.train(0).x.max() <= 1


def test_the_official_test_images_can_be_divided_among_the_clients(idx_folder, monkeypatch):
    fashion_of(monkeypatch, idx_folder)
    partition = Iid(num_clients=5, test_share=0.25)
    data = mnist(variant="fashion", path=idx_folder, partition=partition, official_test=False).data
    assert sizes(data) == [(12, 4)] * 5
    assert data.pooled_test is None
    with pytest.raises(SettingError, match="no official test images"):
        mnist(variant="small", official_test=False)


def test_images_without_as_many_labels_are_refused(idx_folder, monkeypatch):
    (idx_folder / mnist_images.FILES["train"][1]).write_bytes(idx(np.zeros(7, np.uint8)))
    fashion_of(monkeypatch, idx_folder)
    with pytest.raises(DataError, match=r"60 images, .* 7 labels"):
        mnist(variant="fashion", path=idx_folder)


def test_nothing_need_be_held_out_at_clients_where_there_is_an_official_test_part(idx_folder, monkeypatch):
    fashion_of(monkeypatch, idx_folder)
    data = mnist(variant="fashion", path=idx_folder, partition=Iid(num_clients=6, test_share=0)).data
    assert sizes(data) == [(10, 0)] * 6


@pytest.fixture
def leaf_folder(tmp_path):
    """Write three writers in LEAF's layout, one of them in two files."""
    for folder in ("all_data", "train", "test"):
        (tmp_path / folder).mkdir()

    def put(file, **of_writer):
        content = {"users": [*of_writer], "num_samples": [*map(len, of_writer.values())], "user_data": {}}
        for writer, labels in of_writer.items():
            content["user_data"][writer] = {"x": [[1.0] * 783 + [0.25]] * len(labels), "y": labels}
        (tmp_path / file).write_text(json.dumps(content))

    put("all_data/all_data_0.json", never_read=[1])
    put("train/part_0.json", f0001_41=[0, 61, 3, 4], f0000_14=[5, 6])
    put("train/part_1.json", f0002_09=[7, 8, 9])
    put("test/part_0.json", f0001_41=[1, 2])
    return tmp_path


def test_femnist_keeps_the_contract_of_scenarios(leaf_folder):
    check_scenario(lambda: mnist(variant="femnist", path=leaf_folder, model="linear"))


def test_femnist_lies_at_its_writers(leaf_folder):
    data = mnist(variant="femnist", path=leaf_folder, partition=Natural(test_share=0)).data
    assert [data.name(client) for client in data.clients] == ["f0000_14", "f0001_41", "f0002_09"]
    assert sizes(data) == [(2, 0), (6, 0), (3, 0)]
    assert sorted(data.train(1).y.tolist()) == [0, 1, 2, 3, 4, 61]
    assert data.num_classes == 62
    assert data.train(0).x[0, -1, -2:, 0].tolist() == [0.0, 0.75]  # paper is dark and ink bright, as in MNIST


def test_femnist_in_another_layout_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"users": ["a"], "user_data": {"a": {"x": [], "y": [1]}}}')
    with pytest.raises(DataError, match="not in LEAF's layout"):
        mnist(variant="femnist", path=tmp_path)


def test_who_has_no_femnist_is_told_how_it_is_made(tmp_path):
    for path in (None, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"preprocess\.sh"):
            mnist(variant="femnist", path=path)


def test_an_unknown_variant_is_named():
    with pytest.raises(SettingError, match="variant='fashion'"):
        mnist(variant="fashon")


def test_the_official_test_images_of_mnist_are_the_ten_thousand():
    folder = shelf("mnist-t10k")
    images, labels = (read_idx(folder / name) for name in mnist_images.FILES["t10k"])
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# --- CIFAR-10


def batch(images_NHWC, labels):
    """Return a batch as Python 2 pickled it, opcode for opcode."""
    pixels = images_NHWC.transpose(0, 3, 1, 2).tobytes()
    shape = struct.pack("<H", len(labels)) + b"M" + struct.pack("<H", 3072)
    return b"".join(
        [
            b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(",
            *(b"K" + bytes([label]) for label in labels),
            b"eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08",
            b"K\x00\x85U\x01b\x87Rq\t(K\x01M",
            shape,
            b"\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNN",
            b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T",
            struct.pack("<i", len(pixels)) + pixels,
            b"tbU\tfilenamesq\x0c]q\r(U\x0eleptodactylus.q\x0e",
            b"cos\nabort\nq\x0f)Reu.",  # if it was executed, this would end the process
        ]
    )


@pytest.fixture
def tarball(tmp_path, monkeypatch):
    """Create an archive with six batches of ten images in the official layout."""
    images, labels = RNG.integers(0, 256, (60, 32, 32, 3), np.uint8), np.arange(60) % 10
    with tarfile.open(tmp_path / cifar_images.TARBALL, "w:gz") as archive:
        for number, name in enumerate((*cifar_images.TRAIN, *cifar_images.TEST)):
            current = slice(10 * number, 10 * number + 10)
            content = batch(images[current], labels[current].tolist())
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(cifar_images, "CIFAR10", of_files(tmp_path, cifar_images.TARBALL))
    return tmp_path, images, labels


def test_the_python_archive_is_read_without_running_what_is_in_it(tarball):
    folder, images, labels = tarball
    (train, train_labels), (test, test_labels), source = cifar_images.read_cifar10(path=folder)
    np.testing.assert_array_equal(train, images[:50])
    np.testing.assert_array_equal(test, images[50:])
    assert [*train_labels, *test_labels] == labels.tolist()
    assert "JPEG" not in source


def test_a_batch_whose_parts_do_not_fit_is_refused(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / cifar_images.TARBALL, "w:gz") as archive:
        content = batch(np.zeros((2, 32, 32, 3), np.uint8), [1, 2, 3])
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(cifar_images, "CIFAR10", of_files(tmp_path, cifar_images.TARBALL))
    with pytest.raises(DataError, match="data_batch_1 holds 6144 bytes of pixels and 3 labels"):
        cifar_images.read_cifar10(path=tmp_path)


def test_an_archive_that_lacks_a_batch_is_refused(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / cifar_images.TARBALL, "w:gz"):
        pass
    monkeypatch.setattr(cifar_images, "CIFAR10", of_files(tmp_path, cifar_images.TARBALL))
    with pytest.raises(DataError, match="data_batch_1 is not in the archive"):
        cifar_images.read_cifar10(path=tmp_path)


def test_cifar_is_judged_on_its_test_batch_and_distorts_training_images_only(tarball):
    folder, images, _ = tarball
    scenario = cifar10(path=folder, partition=Iid(num_clients=5), model="linear", rotation=0)
    assert sizes(scenario.data) == [(9, 1)] * 5
    np.testing.assert_allclose(scenario.data.pooled_test().x, images[50:] / 127.5 - 1, atol=1e-6)
    still = cifar10(path=folder, partition=Iid(num_clients=5), model="linear", flip=False, shift=0, rotation=0)
    assert np.abs(rounds_in(scenario) - rounds_in(still)).max() > 1e-3
    x, params = scenario.data.test(0).x, scenario.trainer.init(1)
    np.testing.assert_array_equal(scenario.trainer.predict(params, x), still.trainer.predict(params, x))


def test_photographs_keep_the_contract_of_scenarios(tarball):
    check_scenario(lambda: cifar10(path=tarball[0], partition=Iid(num_clients=5), model="linear"))


def test_twins_learn_alike_from_distorted_photographs(tarball):
    pytest.importorskip("flax")
    item, other = (
        rounds_in(cifar10(path=tarball[0], partition=Iid(num_clients=5), model="cnn", framework=framework))
        for framework in ("torch", "jax")
    )
    np.testing.assert_allclose(item, other, atol=1e-5)


def test_jpegs_stand_in_for_the_archive_where_only_they_are(monkeypatch):
    pytest.importorskip("PIL")
    folder = shelf("cifar10-jpeg-12k")
    monkeypatch.setenv("FEDLEARN_DATA", str(folder.parent))
    (train, train_labels), (test, _), source = cifar_images.read_cifar10()
    assert (train.shape, test.shape) == ((10_000, 32, 32, 3), (2_000, 32, 32, 3))
    assert set(train_labels) == {*range(10)}
    assert "lossy" in source
    assert "FEDLEARN_DATA" in source


# --- pneumonia


@pytest.fixture
def x_ray_folder(tmp_path, monkeypatch):
    """Write MedMNIST's layout: 40 images for training, 10 for validation, 12 for testing."""
    parts = {}
    for part, number in (("train", 40), ("val", 10), ("test", 12)):
        parts[f"{part}_images"] = RNG.integers(0, 256, (number, 28, 28), np.uint8)
        parts[f"{part}_labels"] = (np.arange(number) % 4 > 0).astype(np.uint8)[:, None]
    np.savez(tmp_path / x_rays.FILE, **parts)
    monkeypatch.setattr(x_rays, "PNEUMONIA", of_files(tmp_path, x_rays.FILE))
    return tmp_path


def test_x_rays_lie_at_hospitals_and_other_patients_are_what_counts(x_ray_folder):
    scenario = pneumonia.pneumonia(path=x_ray_folder, partition=Iid(num_clients=5))
    assert scenario.model == "gn_cnn 28x28x1-16-32-64"
    assert sizes(scenario.data) == [(9, 1)] * 5
    assert scenario.data.pooled_test().y.tolist() == [0, 1, 1, 1] * 3
    assert -1 <= scenario.data.train(0).x.min() < scenario.data.train(0).x.max() <= 1


def test_x_rays_keep_the_contract_of_scenarios(x_ray_folder):
    check_scenario(lambda: pneumonia.pneumonia(path=x_ray_folder, partition=Iid(num_clients=5), model="mlp"))


def test_a_new_x_ray_is_read_as_the_scenario_has_its_own(x_ray_folder, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    scenario = pneumonia.pneumonia(path=x_ray_folder, partition=Iid(num_clients=5))
    (x, *_) = scenario.data.pooled_test().x
    image.fromarray(np.round(x[..., 0] * 127.5 + 127.5).astype(np.uint8)).save(tmp_path / "chest.png")
    np.testing.assert_array_equal(read_examples(scenario, tmp_path / "chest.png"), x[None])


def test_twins_learn_alike_from_x_rays(x_ray_folder):
    pytest.importorskip("flax")
    item, other = (
        rounds_in(
            pneumonia.pneumonia(path=x_ray_folder, partition=Iid(num_clients=5), model="mlp", framework=framework)
        )
        for framework in ("torch", "jax")
    )
    np.testing.assert_allclose(item, other, atol=1e-5)


def test_the_real_x_rays_are_those_that_medmnist_counts():
    folder = shelf("pneumoniamnist")
    (images, ill), (test, test_ill), _ = x_rays.read_x_rays(path=folder)
    assert (images.shape, test.shape) == ((5232, 28, 28), (624, 28, 28))
    assert (ill.sum(), test_ill.sum()) == (3883, 390)


def test_x_rays_lie_unevenly_at_twenty_hospitals_by_default():
    data = pneumonia.pneumonia(path=shelf("pneumoniamnist")).data
    shares = [data.train(client).y.mean() for client in data.clients]
    assert len(shares) == 20
    assert min(shares) < 0.2 < 0.9 < max(shares)


# --- intensive care


def stays(num_stays=30):
    """Return hourly values in the benchmark's layout: a third is not measured, and one value never is."""
    ids = np.sort(RNG.choice(np.concatenate([np.arange(b, b + 40) for b in icu.BLOCKS]), num_stays, False))
    hours = {name: RNG.normal(SCALES[name][0], 1, (num_stays, 25)) for name in icu.HOURLY_COLUMNS}
    for values in hours.values():
        values[RNG.random(values.shape) < 1 / 3] = np.nan
    hours["tnt"][:] = np.nan
    return ids, hours


@pytest.fixture
def stay_folder(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    ids, hours = stays()
    dyn = {"stay_id": np.repeat(ids, 25), **{name: values.ravel() for name, values in hours.items()}}
    dyn = {name: pyarrow.array(column, from_pandas=True) for name, column in dyn.items()}  # NaN as null, as published
    sex = np.where(np.arange(len(ids)) % 2 == 0, "Female", "Male")
    sta = {"stay_id": ids, "age": 60.0 + np.arange(len(ids)), "sex": sex, "height": [None, *[170.0] * 29]}
    for name, columns in (
        ("dyn", dyn),
        ("sta", {**sta, "weight": [80.0] * 30}),
        ("outc", {"stay_id": ids, "label": (np.arange(30) % 5 == 0).astype(np.int32)}),
    ):
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    monkeypatch.setattr(icu, "ICU_STAYS", of_files(tmp_path, "dyn.parquet", "sta.parquet", "outc.parquet"))
    return tmp_path, ids, hours


def test_hourly_tables_become_one_row_for_each_stay(stay_folder):
    folder, ids, hours = stay_folder
    table, died, block, _ = icu.read_icu_stays(path=folder)
    assert table.shape == (30, 196)
    assert died.tolist() == [1, 0, 0, 0, 0] * 6
    assert all(icu.BLOCKS[b] <= stay < icu.BLOCKS[b] + 40 for stay, b in zip(ids, block, strict=True))
    of = dict(zip(icu.COLUMNS, table.T, strict=True))
    assert of["sex"].tolist() == [0, 1] * 15
    assert np.isnan(of["height"]).tolist() == [True] + [False] * 29
    np.testing.assert_allclose(of["hr_mean"], np.nanmean(hours["hr"], axis=1))
    np.testing.assert_array_equal(of["ph_min"], np.nanmin(hours["ph"], axis=1))
    np.testing.assert_array_equal(of["na_max"], np.nanmax(hours["na"], axis=1))
    np.testing.assert_array_equal(of["k_count"], (~np.isnan(hours["k"])).sum(axis=1))
    assert np.isnan(of["tnt_mean"]).all()
    assert not of["tnt_count"].any()


def test_stays_keep_the_contract_of_scenarios(stay_folder):
    check_scenario(lambda: icu_mortality(path=stay_folder[0], partition=Iid(num_clients=3)))


def test_scaling_puts_the_missing_and_the_healthy_at_zero_and_looks_at_no_other_stay():
    healthy = np.array([[SCALES.get(c, SCALES.get(c.rpartition("_")[0]))[0] for c in icu.COLUMNS]], float)
    counts = np.array([column.endswith("_count") for column in icu.COLUMNS])
    healthy[:, counts] = 0
    assert not scaled_stays(healthy).any()
    missing = np.where(counts, 0, np.nan)[None]
    assert not scaled_stays(missing).any()
    both = scaled_stays(np.concatenate([healthy, healthy * 1e6]))
    assert not both[0].any()
    assert np.abs(both).max() < 40
    assert scaled_stays(np.full((1, 196), 25.0))[:, counts].tolist() == [[1.0] * 48]


def test_new_stays_are_read_from_a_table_as_the_scenario_has_its_own(stay_folder, tmp_path):
    folder, _, _ = stay_folder
    table_N, _, _, _ = icu.read_icu_stays(path=folder)
    read = partial(read_examples, icu_mortality(path=folder, partition=Iid(num_clients=3)))
    shuffled = RNG.permutation(196)
    cells = np.where(np.isnan(table_N), "", table_N.astype(str))[:, shuffled]
    names = np.array(icu.COLUMNS)[shuffled]
    (tmp_path / "new.csv").write_text("\n".join(",".join(row) for row in [names, *cells]))
    np.testing.assert_array_equal(read(tmp_path / "new.csv"), scaled_stays(table_N))
    (tmp_path / "new.csv").write_text("age,sex\n60,1\n")
    with pytest.raises(DataError, match=r"new.csv has no column height\n  expected  age, sex, height, weight, "):
        read(tmp_path / "new.csv")


def test_a_model_of_mortality_starts_from_the_rate_that_is_known(stay_folder):
    from scipy.special import expit

    for model in ("linear", "mlp"):
        scenario = icu_mortality(path=stay_folder[0], model=model, partition=Iid(num_clients=3))
        chances = expit(scenario.trainer.predict(scenario.trainer.init(1), scenario.data.train(0).x))
        np.testing.assert_allclose(chances, PRIOR_MORTALITY, rtol=1e-5)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_twins_learn_alike_from_stays(stay_folder, model):
    pytest.importorskip("flax")
    item, other, both = (
        rounds_in(icu_mortality(path=stay_folder[0], model=model, partition=Iid(num_clients=5), framework=framework))
        for framework in ("torch", "jax", "mixed")
    )
    np.testing.assert_allclose(item, other, atol=1e-5)
    np.testing.assert_allclose(item, both, atol=1e-5)


def test_real_stays_lie_at_thirteen_blocks_with_few_deaths():
    data = icu_mortality(path=shelf("eicu-demo-mortality24")).data
    sizes_K = [train + test for train, test in sizes(data)]
    assert sizes_K == [106, 111, 96, 66, 134, 116, 171, 91, 70, 182, 51, 118, 55]
    deaths = [data.train(k).y.sum() + data.test(k).y.sum() for k in data.clients]
    assert deaths == [3, 5, 5, 2, 9, 4, 11, 5, 3, 7, 6, 7, 3]
    assert data.name(12) == "block 12"
    assert max(np.abs(data.train(k).x).max() for k in data.clients) < 9
