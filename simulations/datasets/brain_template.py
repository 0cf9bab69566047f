"""Read the brain template MNI ICBM 152, with its maps of grey and white matter.

The template is the mean of 152 brains in one space, so it holds no data of a single person. Volumes are NIfTI-1 files
with unsigned bytes.

Shapes: N slices, S = 48 pixels high and wide.

Reference: Fonov et al., *Unbiased average age-appropriate atlases for pediatric studies*, NeuroImage 54, 2011.
"""

from __future__ import annotations

import gzip
import struct
from os import PathLike
from pathlib import Path

import numpy as np

from fedlearn.data.download import DataSet, Wheel, find
from fedlearn.errors import DataError

PLANES = ("sagittal", "coronal", "axial")  # planes of the slices, in the order of the axes of the volume
TISSUES = ("background", "grey matter", "white matter")
SIZE, BLOCK, STEP = 48, 5, 3  # pixels of a side; voxels of a pixel; voxels between two slices
SHAPE = (197, 233, 189)  # voxels of 1 mm
HEADER_BYTES, MAX_BYTES = 352, 2**24  # an untrusted archive may unpack to much more
MIN_TISSUE = 0.02  # share of tissue in a slice that is used
_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_DIGESTS = {
    "t1": "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
    "gm": "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed",
    "wm": "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db",
}
BRAIN_TEMPLATE = DataSet(
    name="brain-template",
    about="slices of a mean brain (MRI): which pixels are grey matter, which are white matter?",
    clients="3 planes",
    licence="MNI ICBM 152: free use with its notice",
    citation="Fonov et al., Unbiased average age-appropriate atlases for pediatric studies, NeuroImage 54, 2011",
    megabytes=11.5,
    origins=(
        Wheel(
            name="nilearn",
            version="0.14.1",
            sha256="725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
            members={
                f"nilearn/datasets/data/{_FILE.format(name)}": f"sha256:{digest}" for name, digest in _DIGESTS.items()
            },
        ),
    ),
)


def read_brain_slices(path: str | PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Read slices of the template in three planes.

    Args:
        path: folder with the three ``.nii.gz`` files; None searches for them.

    Returns:
        images: ``(N, 48, 48, 1)`` bytes, the intensity of MRI (T1).
        tissues: ``(N, 48, 48)``, number of the tissue in `TISSUES`.
        planes: ``(N,)``, number of the plane in `PLANES`.
        place: source of the files.

    Raises:
        DataError: The files are missing or damaged.
    """
    location = find(BRAIN_TEMPLATE, path=path)
    t1, grey, white = (_read_volume(location.files[_FILE.format(name)]) for name in ("t1", "gm", "wm"))
    parts = [_slices(plane, t1, grey, white) for plane in range(3)]
    images, tissues = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    planes = np.repeat(np.arange(3), [len(part[0]) for part in parts])
    return images[..., None], tissues, planes, location.place


def _read_volume(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        content = file.read(MAX_BYTES)
    shape, kind = struct.unpack("<3h", content[42:48]), struct.unpack("<h", content[70:72])[0]
    if shape != SHAPE or kind != 2 or len(content) != HEADER_BYTES + np.prod(SHAPE):
        raise DataError(
            f"{path} is not a volume of {SHAPE} bytes\n  try       python -m simulations.data brain-template"
        )
    return np.frombuffer(content, np.uint8, offset=HEADER_BYTES).reshape(SHAPE, order="F")


def _slices(plane: int, t1: np.ndarray, grey: np.ndarray, white: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and the tissues of each third slice of a plane that has tissue."""
    image, grey_share, white_share = (_small(np.moveaxis(volume, plane, 0)[::STEP]) for volume in (t1, grey, white))
    is_tissue = grey_share + white_share >= 128
    tissues = np.where(is_tissue, np.where(white_share > grey_share, 2, 1), 0)
    used = is_tissue.mean(axis=(1, 2)) >= MIN_TISSUE
    return np.round(image[used]).astype(np.uint8), tissues[used].astype(np.int64)


def _small(slices: np.ndarray) -> np.ndarray:
    """Return the means of blocks of pixels, in the middle of a square."""
    height, width = slices.shape[1:]
    side = SIZE * BLOCK
    square = np.zeros((len(slices), side, side), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = slices
    return square.reshape(len(slices), SIZE, BLOCK, SIZE, BLOCK).mean(axis=(2, 4))
