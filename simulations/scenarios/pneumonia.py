"""The scenario `pneumonia`: detect pneumonia in chest X-rays, at hospitals with different shares of cases.

Shapes: N images of 28 x 28 x 1.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

from fedlearn.core.records import Examples
from fedlearn.data.from_arrays import partition_arrays
from fedlearn.data.inputs import ImageInputs
from fedlearn.data.partition import Partition, as_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.loop.scenario import Scenario, declares_model
from simulations.datasets.pneumonia import read_x_rays
from simulations.models import build_trainer, network_of

INPUTS = ImageInputs(height=28, width=28, channels=1, offset=127.5, scale=127.5)  # in [-1, 1]
TARGET = Target(name="diagnosis", task="binary", classes=("normal", "pneumonia"))
PREPROCESSING = Preprocessing(inputs=INPUTS, target=TARGET)
SHAPE: dict[str, Any] = {"input_shape": (28, 28, 1), "hidden": (64,)}
NETWORK = network_of(**SHAPE)


@declares_model(lambda settings: (PREPROCESSING, NETWORK))
def pneumonia(
    *,
    framework: str = "torch",
    model: Any = "gn_cnn",
    partition: Partition | str = "dirichlet",
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Detect pneumonia of children: 5,232 chest X-rays of 28 x 28 pixels for training, scaled to [-1, 1].

    The hospitals share MedMNIST's training and validation sets. Each hospital holds out some of its X-rays, for the
    metrics of that hospital. Models are evaluated on MedMNIST's test set, 624 X-rays of other patients.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``gn_cnn`` (three convolutions with group norm), ``resnet8``, ``resnet20``, ``lenet``, ``vgg``, ``cnn``,
            ``mlp``, ``linear``, or a module with one output.
        partition: a kind other than ``natural``; defaults: 20 clients, 1 class per client, test share 0.1.
        seed: seed of the partition and of the test split.
        path: folder with ``pneumoniamnist.npz``; None searches for it.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: Yang et al., *MedMNIST v2*, Scientific Data 10, 2023, arXiv:2110.14795; Kermany et al., *Identifying
    Medical Diagnoses and Treatable Diseases by Image-Based Deep Learning*, Cell 172, 2018. CC BY 4.0.
    """
    (images_N, ill_N), (test_images, test_ill), place = read_x_rays(path=path)
    partition = as_partition(partition, num_clients=20, classes_per_client=1, test_share=0.1)
    data = partition_arrays(INPUTS.transform(images_N), ill_N, partition, task="binary", seed=seed)
    official = Examples(INPUTS.transform(test_images), test_ill)
    data = replace(data, pooled_test=lambda: official, source=f"PneumoniaMNIST (MedMNIST v2), from {place}")
    fitted, line = build_trainer(model, data, framework=framework, device=device, **SHAPE)
    return Scenario(
        name="pneumonia",
        data=data,
        trainer=fitted,
        model=line,
        metric="auc",
        partition=str(partition),
        preprocessing=PREPROCESSING,
        network=NETWORK,
    )
