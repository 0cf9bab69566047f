"""The scenario `digits`: classify handwritten digits; small enough for quick trials.

Shapes: N images of 8 x 8 x 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedlearn.data.column_types import Number
from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.inputs import TableInputs
from fedlearn.data.partition import Partition, add_feature_noise, as_partition, partition_rows
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.tables import Table
from fedlearn.loop.scenario import Scenario, declares_model
from simulations.datasets.scikit_learn import read_digits
from simulations.models import build_trainer, network_of

PIXELS = tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8))  # names in scikit-learn
INPUTS = TableInputs(columns=tuple(Number(name=name, spread=16.0) for name in PIXELS), shape=(8, 8, 1))
PREPROCESSING = Preprocessing(
    inputs=INPUTS,
    target=Target(name="digit", task="multiclass", classes=tuple("0123456789")),
)
SHAPE: dict[str, Any] = {"input_shape": (8, 8, 1), "hidden": (64,)}
NETWORK = network_of(**SHAPE)


@declares_model(lambda settings: (PREPROCESSING, NETWORK))
def digits(
    *,
    framework: str = "torch",
    model: Any = "mlp",
    partition: Partition | str = "dirichlet",
    feature_noise: float = 0.0,
    seed: int = 1,
    device: str = "cpu",
) -> Scenario:
    """Classify handwritten digits: 1,797 images of 8 x 8 pixels, scaled to [0, 1].

    The data are part of scikit-learn.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``mlp`` (64-64-10), ``linear``, ``cnn``, or a module with ten outputs.
        partition: a kind other than ``natural``; defaults: 20 clients, 2 classes per client, test share 0.25.
        feature_noise: variance of the noise on the pixels of the last client, >= 0. It grows linearly with the client
            id.
        seed: seed of the partition and of the test split.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.

    Reference: Alpaydin, Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998,
    doi:10.24432/C50P49.
    """
    pixels_N, digit_N = read_digits()
    table = Table(dict(zip(PIXELS, pixels_N.T, strict=True)), (("digits", 1, len(digit_N)),))
    images_N = INPUTS.transform(table)
    partition = as_partition(partition, num_clients=20)
    rows = partition_rows(partition, digit_N, seed=seed)
    images_N = add_feature_noise(images_N, rows, level=feature_noise, seed=seed)
    data = from_arrays(
        images_N, digit_N, assignment=rows, task="multiclass", test_share=partition.held_out_share, seed=seed
    )
    data = replace(data, source="UCI handwritten digits, from scikit-learn")
    fitted, line = build_trainer(model, data, framework=framework, device=device, **SHAPE)
    header = f"{partition} · feature noise {feature_noise:g}" if feature_noise else str(partition)
    return Scenario(
        name="digits",
        data=data,
        trainer=fitted,
        model=line,
        partition=header,
        preprocessing=PREPROCESSING,
        network=NETWORK,
    )
