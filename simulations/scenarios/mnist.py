"""The scenario `mnist`: classify images of MNIST, Fashion-MNIST or FEMNIST.

Shapes: N images of 28 x 28 x 1.
"""

from __future__ import annotations

import string
from dataclasses import replace
from os import PathLike
from typing import Any

from fedlearn.core.records import Examples
from fedlearn.data.from_arrays import partition_arrays
from fedlearn.data.inputs import ImageInputs
from fedlearn.data.partition import Natural, Partition, as_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.loop.scenario import Scenario, declares_model
from simulations.datasets.mnist import read_images
from simulations.models import build_trainer, network_of

INPUTS = ImageInputs(height=28, width=28, channels=1)  # in [0, 1]
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CHARACTERS = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
SHAPE: dict[str, Any] = {"input_shape": (28, 28, 1), "hidden": (128, 64)}
NETWORK = network_of(**SHAPE)


def preprocessing_of(variant: str) -> Preprocessing:
    """Return inputs and classes of a variant."""
    classes = {"fashion": FASHION, "femnist": CHARACTERS}.get(variant, CHARACTERS[:10])
    return Preprocessing(inputs=INPUTS, target=Target(name="label", task="multiclass", classes=classes))


@declares_model(lambda settings: (preprocessing_of(settings.get("variant", "small")), NETWORK))
def mnist(
    *,
    variant: str = "small",
    framework: str = "torch",
    model: Any = "mlp",
    partition: Partition | str | None = None,
    official_test: bool = True,
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Classify digits, clothes or characters: images of 28 x 28 pixels, scaled to [0, 1].

    If a variant has an official test set, models are evaluated on it. The examples that each client holds out give the
    metrics of that client.

    Args:
        variant: ``small`` (5,000 digits from a package), ``small_10k`` (the same, with the 10,000 official test
            images), ``full`` (MNIST), ``fashion`` (Fashion-MNIST) or ``femnist`` (62 characters, by writer).
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``mlp`` (784-128-64-10), ``linear``, ``cnn``, ``lenet``, ``gn_cnn``, ``vgg``, ``resnet8``, ``resnet20``,
            or a module with one output per class.
        partition: None is ``natural`` (writers) for ``femnist``, else ``dirichlet``; defaults: 20 clients, 2 classes
            per client, test share 0.2.
        official_test: False divides the official test images among the clients, too. Then models are evaluated on the
            images that clients hold out.
        seed: seed of the partition and of the test split.
        path: folder with the variant's files (for ``small_10k``: the test files); None searches for them.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: LeCun, Bottou, Bengio, Haffner, *Gradient-Based Learning Applied to Document Recognition*, Proceedings
    of the IEEE 86, 1998 (CC BY-SA 3.0); Xiao, Rasul, Vollgraf, *Fashion-MNIST*, 2017, arXiv:1708.07747 (MIT); Caldas et
    al., *LEAF: A Benchmark for Federated Settings*, 2018, arXiv:1812.01097 (FEMNIST).
    """
    found = read_images(variant, path=path)
    default = "dirichlet" if found.writer_N is None else "natural"
    partition = as_partition(partition or default, num_clients=20, test_share=0.2)
    found = found if official_test else found.with_test_images()
    x_N = INPUTS.transform(found.x_N)
    data = partition_arrays(x_N, found.y_N, partition, task="multiclass", natural_N=found.writer_N, seed=seed)
    names = dict(enumerate(found.writer_names)) if isinstance(partition, Natural) else {}
    data = replace(data, names=names, source=found.source, num_classes=found.num_classes)
    if found.test:
        official = Examples(INPUTS.transform(found.test[0]), found.test[1])
        data = replace(data, pooled_test=lambda: official)
    fitted, line = build_trainer(model, data, framework=framework, device=device, **SHAPE)
    return Scenario(
        name="mnist",
        data=data,
        trainer=fitted,
        model=line,
        partition=str(partition),
        preprocessing=preprocessing_of(variant),
        network=NETWORK,
    )
