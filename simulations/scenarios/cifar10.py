"""The scenario `cifar10`: classify small photographs.

Shapes: N images of 32 x 32 x 3.
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
from fedlearn.trainers.augmentation import Augmentation, AugmentedTrainer
from simulations.datasets.cifar10 import read_cifar10
from simulations.models import build_trainer, network_of

# in [-1, 1]: grey, which fills the border of shifted images, becomes zero
INPUTS = ImageInputs(height=32, width=32, channels=3, offset=127.5, scale=127.5)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PREPROCESSING = Preprocessing(inputs=INPUTS, target=Target(name="object", task="multiclass", classes=CLASSES))
SHAPE: dict[str, Any] = {"input_shape": (32, 32, 3), "hidden": (128, 64)}
NETWORK = network_of(**SHAPE)


@declares_model(lambda settings: (PREPROCESSING, NETWORK))
def cifar10(
    *,
    framework: str = "torch",
    model: Any = "gn_cnn",
    partition: Partition | str = "dirichlet",
    flip: bool = True,
    shift: int = 4,
    rotation: float = 15.0,
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Classify photographs of ten kinds of animals and vehicles: 32 x 32 pixels in color, scaled to [-1, 1].

    In each round, training images are flipped, shifted and rotated at random. Models are evaluated on the official test
    images.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``gn_cnn``, ``vgg``, ``resnet20``, ``resnet8``, ``lenet``, ``cnn``, ``mlp``, ``linear``, or a module
            with ten outputs.
        partition: a kind other than ``natural``; defaults: 20 clients, 2 classes per client, test share 0.1.
        flip: whether to mirror images left to right, with probability 0.5.
        shift: maximum shift in each direction, pixels, >= 0.
        rotation: maximum rotation in each direction, degrees, >= 0.
        seed: seed of the partition and of the test split.
        path: folder with the official tarball, or with 12,000 of the images as JPEG; None searches for them.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """
    augmentation = Augmentation(flip=flip, shift=shift, rotation=rotation)
    (images_N, label_N), (test_images, test_labels), source = read_cifar10(path=path)
    partition = as_partition(partition, num_clients=20, test_share=0.1)
    data = partition_arrays(INPUTS.transform(images_N), label_N, partition, task="multiclass", seed=seed)
    official = Examples(INPUTS.transform(test_images), test_labels)
    data = replace(data, pooled_test=lambda: official, source=source)
    fitted, line = build_trainer(model, data, framework=framework, device=device, **SHAPE)
    trainer = AugmentedTrainer(fitted, augmentation) if flip or shift or rotation else fitted
    return Scenario(
        name="cifar10",
        data=data,
        trainer=trainer,
        model=line,
        partition=str(partition),
        preprocessing=PREPROCESSING,
        network=NETWORK,
    )
