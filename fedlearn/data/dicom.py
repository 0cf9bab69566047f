"""Read DICOM files as images of Pillow. Values are in the unit of the file, e.g. Hounsfield units in CT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.data.images import ImageProblem
from fedlearn.errors import MissingExtra

PHOTOMETRIC_GREY = ("MONOCHROME1", "MONOCHROME2")


def open_dicom(file: Path) -> Any:
    """Return the image of a DICOM file: mode ``F`` for grey, with slope and intercept applied, or ``RGB``.

    In ``MONOCHROME1`` small values are bright. Such values are inverted within the range of their bits.

    Raises:
        MissingExtra: pydicom is not installed.
        ImageProblem: the file has several frames.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_rescale, convert_color_space
    except ImportError as error:
        raise MissingExtra(f"{file.name} (DICOM)", "dicom") from error
    from PIL import Image

    dataset: Any = pydicom.dcmread(file)
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames > 1:
        raise ImageProblem(f"{frames} frames or pages in one file")
    interpretation, pixels = str(dataset.PhotometricInterpretation), dataset.pixel_array
    if interpretation not in PHOTOMETRIC_GREY:
        rgb = pixels if interpretation == "RGB" else convert_color_space(pixels, interpretation, "RGB")
        return Image.fromarray(np.asarray(rgb, np.uint8), "RGB")
    if interpretation == "MONOCHROME1":
        low = -(2 ** (int(dataset.BitsStored) - 1)) if int(dataset.PixelRepresentation) else 0
        pixels = 2 * low + 2 ** int(dataset.BitsStored) - 1 - pixels.astype(np.int64)
    return Image.fromarray(np.asarray(apply_rescale(pixels, dataset), np.float32), "F")
