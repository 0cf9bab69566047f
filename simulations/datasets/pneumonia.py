"""Read PneumoniaMNIST, chest X-rays of children.

Shapes: N images of 28 x 28 bytes.
"""

from __future__ import annotations

from os import PathLike

import numpy as np

from fedlearn.data.download import DataSet, LocalCopy, OfficialSource, find

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


def read_x_rays(
    *, path: str | PathLike[str] | None = None
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], str]:
    """Read 5,232 training images and 624 test images.

    Args:
        path: folder with the file; None searches for it.

    Returns:
        ``((images, ill), (test images, test ill), source)``, with 1 for pneumonia.

    Raises:
        DataError: The file is not available.
    """
    location = find(PNEUMONIA, path=path)
    with np.load(location.files[FILE], allow_pickle=False) as arrays:
        images = {part: arrays[f"{part}_images"] for part in ("train", "val", "test")}
        ill = {part: arrays[f"{part}_labels"].astype(np.int64).ravel() for part in images}
    train_images, train_ill = (np.concatenate([parts["train"], parts["val"]]) for parts in (images, ill))
    return (train_images, train_ill), (images["test"], ill["test"]), location.place
