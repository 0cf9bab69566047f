"""Download and read CIFAR-10. The pickles of the data set are parsed, never executed.

Shapes: N images of 32 x 32 x 3.

Reference: Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
"""

from __future__ import annotations

import io
import pickletools
import tarfile
from itertools import pairwise
from os import PathLike
from pathlib import Path

import numpy as np

from fedlearn.data.download import DataSet, LocalCopy, OfficialSource, find, find_local
from fedlearn.errors import DataError, MissingExtra

TARBALL, JPEGS = "cifar-10-python.tar.gz", "cifar10_jpeg_12k.npz"
TRAIN, TEST = tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",)
CHANNELS, HEIGHT, WIDTH = 3, 32, 32
ImagesAndLabels = tuple[np.ndarray, np.ndarray]  # images (N, 32, 32, 3) uint8, and class numbers (N,)

OFFICIAL = OfficialSource(
    base_url="https://www.cs.toronto.edu/~kriz", files={TARBALL: "md5:c58f30108f718f92721af3b95e74349a"}
)
JPEG_SUBSET = LocalCopy(files={JPEGS: "sha256:1b663f6f7a0b99191f0142e53d3962ae4311e5cf5d47e8fb1b93de143a35a74d"})
FIX = "\n  expected  the official archive of CIFAR-10\n  advice    another copy of the archive"
CITATION = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
CIFAR10 = DataSet(
    name="cifar10",
    about="60,000 photographs of 32 x 32 pixels: which of ten animals and vehicles is it?",
    licence="not stated",
    citation=CITATION,
    megabytes=170.5,
    origins=(OFFICIAL, JPEG_SUBSET),
)
CIFAR10_JPEG = DataSet(
    name="cifar10-jpeg-12k",
    about="12,000 images of CIFAR-10, stored as JPEG (lossy)",
    licence="not stated",
    citation=CITATION,
    origins=(JPEG_SUBSET,),
)


def read_cifar10(*, path: str | PathLike[str] | None = None) -> tuple[ImagesAndLabels, ImagesAndLabels, str]:
    """Read all of CIFAR-10, or a subset of 12,000 images that are stored as JPEG.

    Args:
        path: folder with the official tarball or with the JPEG file. None searches for the tarball on this
            machine, then for the JPEG file in ``FEDLEARN_DATA``, then for the tarball at its source.

    Returns:
        ``(train, test, source)``: images and labels of both parts, and the source of the files.

    Raises:
        DataError: The files are not available or damaged.
    """
    location = (
        find_local(CIFAR10, path=path) or (None if path else find_local(CIFAR10_JPEG)) or find(CIFAR10, path=path)
    )
    if TARBALL in location.files:
        train, test = _read_tarball(location.files[TARBALL])
        return train, test, f"CIFAR-10, from {location.place}"
    train, test = _read_jpegs(location.files[JPEGS])
    return train, test, f"CIFAR-10, 12,000 images stored as JPEG (lossy), from {location.place}"


def _read_tarball(file: Path) -> tuple[ImagesAndLabels, ImagesAndLabels]:
    try:
        with tarfile.open(file, "r:gz") as archive:
            parts = {name: _read_member(archive, f"cifar-10-batches-py/{name}") for name in (*TRAIN, *TEST)}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{file} is not a complete tar archive: {error}{FIX}") from error
    train, test = (zip(*(parts[name] for name in names), strict=True) for names in (TRAIN, TEST))
    return _concatenate(*train), _concatenate(*test)


def _concatenate(images: tuple[np.ndarray, ...], labels: tuple[np.ndarray, ...]) -> ImagesAndLabels:
    return np.concatenate(images), np.concatenate(labels)


def _read_member(archive: tarfile.TarFile, name: str) -> ImagesAndLabels:
    """Read one batch. It is a pickle; the function parses its opcodes and executes none of them."""
    where = f"{TARBALL}: {name}"
    try:
        member = archive.extractfile(name)
    except KeyError as error:
        raise DataError(f"{where} is not in the archive{FIX}") from error
    if member is None:
        raise DataError(f"{where} is not a file{FIX}")
    labels: list[int] = []
    key, pixels = "", b""
    for opcode, value, _ in pickletools.genops(member.read()):
        if isinstance(value, str) and "STRING" in opcode.name:  # a pickle of Python 2, where bytes are strings
            key = value if value in ("labels", "data", "filenames", "batch_label") else key
            pixels = max(pixels, value.encode("latin-1"), key=len)
        elif isinstance(value, int) and key == "labels" and opcode.name.startswith("BININT"):
            labels.append(value)
    return _to_images(pixels, labels, where=where)


def _to_images(pixels: bytes, labels: list[int], *, where: str) -> ImagesAndLabels:
    labels_N = np.array(labels, np.int64)
    if len(pixels) != len(labels_N) * CHANNELS * HEIGHT * WIDTH or not set(labels) <= set(range(10)):
        raise DataError(
            f"{where} holds {len(pixels)} bytes of pixels and {len(labels_N)} labels: the numbers do not match{FIX}"
        )
    planes_NCHW = np.frombuffer(pixels, np.uint8).reshape(-1, CHANNELS, HEIGHT, WIDTH)
    return planes_NCHW.transpose(0, 2, 3, 1), labels_N


def _read_jpegs(file: Path) -> tuple[ImagesAndLabels, ImagesAndLabels]:
    """Read a file of concatenated JPEG images with the offset of each image."""
    with np.load(file, allow_pickle=False) as arrays:
        parts = [
            {name: arrays[f"{part}_{name}"] for name in ("jpeg", "offsets", "labels")} for part in ("train", "test")
        ]
    train, test = ((_decode(part["jpeg"], part["offsets"]), part["labels"].astype(np.int64)) for part in parts)
    return train, test


def _decode(jpeg: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    try:
        from PIL import Image  # comes with matplotlib
    except ImportError as error:
        raise MissingExtra("reading JPEG", "report") from error

    files = [jpeg[start:end].tobytes() for start, end in pairwise(offsets)]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
