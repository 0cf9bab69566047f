from __future__ import annotations

import numpy as np
import pytest
from needs import needs

import fedlearn
from fedlearn.errors import DataError, FedlearnError, SettingError
from fedlearn.runner.start import main as simulate
from fedlearn.testing import check_scenario
from simulations.scenarios.folder import folder

needs("torch", "PIL")

from PIL import Image  # noqa: E402

SITES = ("north", "south")
SETTINGS = {"task": "segmentation", "model": "unet"}


def write(folder_path, *, size=16, count=6, seed=0, values=(0, 255)):
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder_path / kind).mkdir(parents=True)
    for number in range(count):
        mask = np.full((size, size), values[0], np.uint8)
        top, left = rng.integers(0, size - 6, 2)
        mask[top : top + 6, left : left + 6] = values[1]
        pixels = np.clip(rng.normal(90, 20, mask.shape) + 80 * (mask == values[1]), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder_path / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder_path / "masks" / f"{number}.png")


@pytest.fixture
def clinics(tmp_path):
    for number, site in enumerate(SITES):
        write(tmp_path / "data" / site, seed=number)
    return tmp_path / "data"


def test_a_folder_per_client_with_images_and_masks_is_a_segmentation(clinics):
    scenario = folder(path=clinics, **SETTINGS)
    check_scenario(lambda: scenario)
    assert scenario.data.names == dict(enumerate(SITES))
    assert scenario.preprocessing.target.classes == ("0", "255")
    mask = np.asarray(Image.open(clinics / "north/masks/0.png")) == 255
    found = np.concatenate([part.y for part in (scenario.data.train(0), scenario.data.test(0))])
    assert any(np.array_equal(y, mask) for y in found)


def test_images_without_clients_need_a_partition(tmp_path):
    write(tmp_path / "data", count=20)
    with pytest.raises(SettingError, match="no folder names a client"):
        folder(path=tmp_path / "data", **SETTINGS)
    assert len(folder(path=tmp_path / "data", partition="iid", **SETTINGS).data.clients) > 1


def test_classes_keep_their_order_and_a_node_needs_them(clinics):
    scenario = folder(path=clinics, classes=[255, 0], **SETTINGS)
    assert scenario.data.train(0).y.mean() > 0.5  # the background has number 1
    with pytest.raises(SettingError, match="classes is None"):
        folder(path=clinics, clients=SITES, deployed=True, **SETTINGS)
    assert (
        folder(path=clinics, clients=[*SITES, "west"], classes=[0, 255], deployed=True, **SETTINGS).data.num_classes
        == 2
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "north/masks/2.png").unlink(), r"2\.png has no mask"),
        (lambda path: (path / "north/masks/2.png").write_bytes(b"x"), "damaged"),
        (lambda path: (path / "north/masks/2.png").rename(path / "north/masks/2.jpg"), "JPEG"),
    ],
)
def test_a_missing_or_damaged_mask_is_named(clinics, change, message):
    change(clinics)
    with pytest.raises(DataError, match=message):
        folder(path=clinics, **SETTINGS)


def test_wrong_values_and_sizes_are_refused(clinics, tmp_path):
    with pytest.raises(FedlearnError, match="a pixel value that is no class"):
        folder(path=clinics, classes=[0, 1], **SETTINGS)
    write(tmp_path / "odd" / "north", size=18)
    with pytest.raises(SettingError, match="multiples of 4"):
        folder(path=tmp_path / "odd", **SETTINGS)
    assert folder(path=tmp_path / "odd", image_size=8, **SETTINGS).data.train(0).y.shape[1:] == (8, 8)


@pytest.mark.slow
def test_a_trained_model_segments_new_images(clinics, tmp_path):
    run = [f"scenario.path={clinics}", "scenario.task=segmentation", "model=unet", "report=false"]
    assert simulate(["scenario=folder", *run, "rounds=2", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    masks = fedlearn.load(tmp_path / "run").predict(clinics / "north" / "images")
    assert masks.shape == (6, 16, 16)
    assert set(np.unique(masks)) <= {0, 1}
