"""The scenario `brain_tissue`: find grey and white matter in slices of a mean brain.

Shapes: N images of 48 x 48 x 1.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

from fedlearn.data.from_arrays import partition_arrays
from fedlearn.data.inputs import ImageInputs
from fedlearn.data.partition import Natural, Partition, as_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.loop.scenario import Scenario, declares_model
from simulations.datasets.brain_template import PLANES, SIZE, TISSUES, read_brain_slices
from simulations.models import build_trainer, network_of

INPUTS = ImageInputs(height=SIZE, width=SIZE, channels=1, offset=127.5, scale=127.5)  # in [-1, 1]
PREPROCESSING = Preprocessing(inputs=INPUTS, target=Target(name="tissue", task="segmentation", classes=TISSUES))
SHAPE: dict[str, Any] = {"input_shape": (SIZE, SIZE, 1)}
NETWORK = network_of(**SHAPE)


@declares_model(lambda settings: (PREPROCESSING, NETWORK))
def brain_tissue(
    *,
    framework: str = "torch",
    model: Any = "unet",
    partition: Partition | str = "natural",
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Find grey and white matter in 149 slices of the brain template MNI ICBM 152, scaled to [-1, 1].

    With ``partition=natural`` the clients are the planes of the slices: sagittal, coronal and axial. Held-out slices
    lie between training slices of one brain, so the scores are higher than for a new brain.

    Args:
        framework: ``torch`` or ``jax``, or ``mixed``.
        model: ``unet``, or a module with outputs ``(B, 3, 48, 48)``.
        partition: ``natural`` (one client per plane) or ``iid``; defaults: 3 clients, test share 0.25.
        seed: seed of the partition and of the test split.
        path: folder with the files of the template; None searches for them.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: Fonov et al., *Unbiased average age-appropriate atlases for pediatric studies*, NeuroImage 54, 2011.
    """
    images, tissues, planes, place = read_brain_slices(path=path)
    partition = as_partition(partition, num_clients=3)
    data = partition_arrays(
        INPUTS.transform(images), tissues, partition, task="segmentation", natural_N=planes, seed=seed
    )
    names = dict(enumerate(PLANES)) if isinstance(partition, Natural) else {}
    data = replace(data, names=names, source=f"MNI ICBM 152, from {place}")
    fitted, line = build_trainer(model, data, framework=framework, device=device, **SHAPE)
    return Scenario(
        name="brain_tissue",
        data=data,
        trainer=fitted,
        model=line,
        partition=str(partition),
        preprocessing=PREPROCESSING,
        network=NETWORK,
    )
