"""Pneumonia in chest X-rays of children, at hospitals that see it more or less often.

Shapes: N images of 28 x 28 x 1.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np

from fedlearn.core.records import Examples
from fedlearn.data.download import DataSet, LocalCopy, OfficialSource, find
from fedlearn.data.folder import read_images_for_shape
from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.partition import Partition, partition_rows
from fedlearn.loop.scenario import Scenario
from simulations.models import build_trainer

FILE = "pneumoniamnist.npz"
PNEUMONIA = DataSet(
    name="pneumoniamnist",
    about="5,856 chest X-rays of children, 28 x 28 pixels: pneumonia or not?",
    licence="CC BY 4.0",
    citation="Yang et al., MedMNIST v2, Scientific Data 10, 2023; Kermany et al., Cell 172, 2018",
    megabytes=4.2,
    origins=(
        OfficialSource(
            base_url="https://zenodo.org/records/10519652/files", files={FILE: "md5:28209eda62fecd6e6a2d98b1501bb15f"}
        ),
        # the same images in another order of rows
        LocalCopy(files={FILE: "sha256:31010242097ace3a3fe9b97190125695de381f11e8b5d74b7b9610ea6c6e4819"}),
    ),
)


def pneumonia(
    *,
    framework: str = "torch",
    model: Any = "gn_cnn",
    partition: str = "dirichlet",
    num_clients: int = 20,
    alpha: float = 0.5,
    classes_per_client: int = 1,
    test_share: float = 0.1,
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Does a child have pneumonia? 5,232 chest X-rays of 28 x 28 pixels to learn from, scaled to [-1, 1].

    Hospitals hold a part of their own X-rays out, to tell how each fares; MedMNIST's training and validation parts
    together are what lies at hospitals, and its test part, 624 X-rays of other patients, is what models are judged on.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``gn_cnn`` (three convolutions with group norm), ``resnet8``, ``resnet20``, ``lenet``, ``vgg``, ``cnn``,
            ``mlp``, ``linear``, or a module of your own with one output.
        partition: ``dirichlet``, ``dirichlet_equal``, ``iid``, ``pathological``, ``shards`` or ``quantity``.
        num_clients: hospitals, >= 1.
        alpha: of ``dirichlet``, ``dirichlet_equal`` and ``quantity``, > 0.
        classes_per_client: of ``pathological``, 1 or 2; of ``shards``, shards for each hospital.
        test_share: held out at each hospital, in [0, 1).
        seed: of partition and split.
        path: a folder with ``pneumoniamnist.npz``; None searches for it.
        device: where to compute.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data cannot be had.

    Reference: Yang et al., *MedMNIST v2*, Scientific Data 10, 2023, arXiv:2110.14795; Kermany et al., *Identifying
    Medical Diagnoses and Treatable Diseases by Image-Based Deep Learning*, Cell 172, 2018. CC BY 4.0.
    """
    (images_N, ill_N), (test_images, test_ill), place = read_x_rays(path=path)
    how = Partition(
        kind=partition, num_clients=num_clients, alpha=alpha, classes_per_client=classes_per_client, seed=seed
    )
    rows = partition_rows(how, ill_N)
    data = from_arrays(scale_images(images_N), ill_N, assignment=rows, task="binary", test_share=test_share, seed=seed)
    official = Examples(scale_images(test_images), test_ill)
    data = replace(data, pooled_test=lambda: official, source=f"PneumoniaMNIST (MedMNIST v2), from {place}")
    shape: dict[str, Any] = {"input_shape": (28, 28, 1), "hidden": (64,)}
    fitted, line = build_trainer(model, data, framework=framework, device=device, **shape)
    return Scenario(
        name="pneumonia",
        data=data,
        trainer=fitted,
        model=line,
        metric="auc",
        partition=str(how),
        read_inputs=lambda place: scale_images(read_images_for_shape((28, 28, 1), place)[..., 0]),
    )


def read_x_rays(
    *, path: str | PathLike[str] | None = None
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], str]:
    """``((images, ill), (test images, test ill), place)``: 5,232 and 624 images of 28 x 28 bytes, 1 for pneumonia.

    Raises:
        DataError: the file cannot be had.
    """
    found = find(PNEUMONIA, path=path)
    with np.load(found.files[FILE], allow_pickle=False) as kept:
        images = {part: kept[f"{part}_images"] for part in ("train", "val", "test")}
        ill = {part: kept[f"{part}_labels"].astype(np.int64).ravel() for part in images}
    seen = tuple(np.concatenate([of["train"], of["val"]]) for of in (images, ill))
    return (seen[0], seen[1]), (images["test"], ill["test"]), found.place


def scale_images(images_N: np.ndarray) -> np.ndarray:
    """Bytes as float32 in [-1, 1], ``(N, 28, 28, 1)``."""
    return ((images_N.astype(np.float32) - np.float32(127.5)) / np.float32(127.5))[..., None]
