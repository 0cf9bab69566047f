"""Read images with a mask each, for segmentation with the scenario `folder`.

The folder has ``images/`` and ``masks/``, or one folder per client with these two. A mask has the name of its image,
and the pixel values of the classes. It is a lossless image, e.g. PNG.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.data.example_files import list_images
from fedlearn.data.fit_images import fit_images
from fedlearn.data.from_arrays import partition_arrays
from fedlearn.data.images import read_images
from fedlearn.data.partition import Natural, Partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.errors import DataError, SettingError, require
from fedlearn.loop.scenario import Scenario
from simulations.models import build_trainer, network_of

MAX_CLASSES = 100  # values of a mask; more values are a photograph, or a mask with blurred edges
LOSSY = (".jpg", ".jpeg")  # these change the values of a mask


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """Hold the settings of a folder with masks.

    Args:
        classes: pixel values of the classes in the order of their numbers; None takes the values in the masks.
        clients: names of all clients in the order of their numbers; None takes the folders.
        image_size: side of the scaled images, pixels, a multiple of 4; None keeps the size.
        image_channels: 1 (grey) or 3 (colour); None is colour if an image is in colour.
        window: see `fedlearn.data.fit_images.fit_images`.
        has_all_clients: False at a real node, which needs ``classes``.
    """

    classes: Sequence[Any] | None = None
    clients: Sequence[Any] | None = None
    image_size: int | None = None
    image_channels: int | None = None
    window: Sequence[float] | None = None
    has_all_clients: bool = True


def mask_folder(
    path: Path, settings: MaskSettings, partition: Partition, *, model: Any, framework: str, device: str, seed: int
) -> Scenario:
    """Build a scenario for segmentation from images and masks.

    Args:
        path: folder.
        settings: settings of the folder.
        partition: partition of the images over the clients.
        model: ``unet``, or a module.
        framework: see `simulations.models.build_trainer`.
        device: see `simulations.models.build_trainer`.
        seed: seed of the partition and of the test split.

    Raises:
        SettingError: a setting does not fit the folder.
        DataError: an image or a mask is missing or damaged.
    """
    names, pairs, client_N = _pairs(path, settings.clients)
    labels = [str(image.relative_to(path)) for image, _ in pairs]
    images = read_images(
        [image for image, _ in pairs], labels, size=settings.image_size, channels=settings.image_channels
    ).pixels
    inputs, description = fit_images(images, settings.window)
    values, mask_NHW = _masks([mask for _, mask in pairs], path, images.shape[1:3], settings)
    is_natural = isinstance(partition, Natural)
    require(
        bool(names) or not is_natural, "partition", partition, "iid, because no folder names a client", "partition=iid"
    )
    if isinstance(partition, Natural):
        partition.require_num_clients(len(names))
    data = partition_arrays(
        inputs.transform(images), mask_NHW, partition, task="segmentation", natural_N=client_N, seed=seed
    )
    data = replace(
        data,
        num_classes=len(values),
        names=dict(enumerate(names)) if is_natural else {},
        source=f"{path.name} · {description}",
    )
    shape = inputs.input_shape
    fitted, line = build_trainer(model, data, input_shape=shape, framework=framework, device=device)
    target = Target(name="mask", task="segmentation", classes=tuple(map(str, values)))
    return Scenario(
        name="folder",
        data=data,
        trainer=fitted,
        model=line,
        partition=str(partition),
        preprocessing=Preprocessing(inputs=inputs, target=target),
        network=network_of(input_shape=shape),
    )


def _pairs(
    path: Path, clients: Sequence[Any] | None
) -> tuple[tuple[str, ...], list[tuple[Path, Path]], np.ndarray | None]:
    """Return the names of the clients, the pairs of image and mask, and the client number of each pair."""
    if (path / "images").is_dir():
        require(clients is None, "clients", clients, "null, because no folder names a client", "clients=null")
        return (), _pairs_in(path), None
    folders = sorted(folder for folder in path.iterdir() if (folder / "images").is_dir()) if path.is_dir() else []
    if not folders:
        fix = "images/a.png with masks/a.png, or north/images/a.png with north/masks/a.png"
        raise DataError(f"{path} has no folder images, which task=segmentation needs\n  advice    {fix}")
    names = tuple(folder.name for folder in folders) if clients is None else tuple(map(str, clients))
    unknown = next((folder.name for folder in folders if folder.name not in names), None)
    expected = f"all clients of the folder, including {unknown}"
    require(unknown is None, "clients", list(names), expected, "'scenario.clients=[north,south]'")
    parts = [_pairs_in(folder) for folder in folders]
    numbers = [names.index(folder.name) for folder in folders]
    return names, [pair for part in parts for pair in part], np.repeat(numbers, [len(part) for part in parts])


def _pairs_in(folder: Path) -> list[tuple[Path, Path]]:
    """Return each image of ``images/`` with the mask of the same name."""
    masks = {file.stem: file for file in list_images(folder / "masks")} if (folder / "masks").is_dir() else {}
    pairs = []
    for image in list_images(folder / "images"):
        mask = masks.get(image.stem)
        if mask is None:
            raise DataError(f"{image} has no mask\n  advice    {folder / 'masks' / image.stem}.png")
        if mask.suffix.lower() in LOSSY:
            raise DataError(f"{mask} is a JPEG file, which changes the values of a mask\n  advice    a PNG file")
        pairs.append((image, mask))
    return pairs


def _masks(
    files: Sequence[Path], path: Path, size: tuple[int, ...], settings: MaskSettings
) -> tuple[list[int], np.ndarray]:
    """Return the pixel values of the classes, and the class number of each pixel, ``(N, H, W)``."""
    mask_list = [_mask(file, size) for file in files]
    mask_NHW = np.stack(mask_list)
    present = np.unique(mask_NHW).tolist()
    if settings.classes is None:
        is_whole = settings.has_all_clients
        fix = "'scenario.classes=[0,255]'"
        require(
            is_whole, "classes", None, "the pixel values of all classes, because this folder lacks some clients", fix
        )
    values = present if settings.classes is None else [int(value) for value in settings.classes]
    if not 2 <= len(values) <= MAX_CLASSES or len(set(values)) < len(values):
        expected = f"2 to {MAX_CLASSES} different pixel values of the masks"
        raise SettingError("classes", f"{len(values)} values", expected, "'scenario.classes=[0,255]'")
    unknown_N = ~np.isin(mask_NHW, values).all(axis=(1, 2))
    if unknown_N.any():
        name = files[int(unknown_N.argmax())].relative_to(path)
        raise DataError(
            f"{name} has a pixel value that is no class\n  advice    'scenario.classes=[0,255]' with all values"
        )
    order = np.argsort(values)
    return values, order[np.searchsorted(np.array(values)[order], mask_NHW)]


def _mask(file: Path, size: tuple[int, ...]) -> np.ndarray:
    """Return the values of a mask, scaled without mixing of values. A palette keeps its numbers."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            numbers = image if image.mode in ("1", "L", "P", "I;16", "I") else image.convert("L")
            small = numbers.resize((size[1], size[0]), Image.Resampling.NEAREST)
            return np.asarray(small).astype(np.int64)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file} is not an image, or damaged\n  advice    another copy of this file") from error
