"""The scenario `diabetes`: predict the progression of diabetes; linear models do well.

Shapes: N patients, 10 features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.datasets import load_diabetes

from fedlearn.data.column_types import Number
from fedlearn.data.from_arrays import partition_arrays
from fedlearn.data.inputs import TableInputs
from fedlearn.data.partition import Partition, as_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.tables import Table
from fedlearn.loop.scenario import Scenario, declares_model
from simulations.models import build_trainer, network_of

# each published feature has unit norm over all 442 patients; times sqrt(442) it has unit variance
FEATURE_SCALE = 442**-0.5
# round public constants, not fitted to any client; scores range from 25 to 346
TARGET_CENTER, TARGET_SCALE = 150.0, 100.0
FEATURES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
INPUTS = TableInputs(columns=tuple(Number(name=name, spread=FEATURE_SCALE, fill=0.0) for name in FEATURES))
PREPROCESSING = Preprocessing(
    inputs=INPUTS,
    target=Target(name="progression", task="regression", centre=TARGET_CENTER, spread=TARGET_SCALE, unit="points"),
)
NETWORK = network_of(input_shape=(10,))


@declares_model(lambda settings: (PREPROCESSING, NETWORK))
def diabetes(
    *,
    framework: str = "torch",
    model: Any = "linear",
    partition: Partition | str = "iid",
    seed: int = 1,
    device: str = "cpu",
) -> Scenario:
    """Predict the progression of diabetes in a year: 442 patients, 10 features.

    The data are part of scikit-learn.

    The model learns ``(score - 150) / 100``. Errors and predictions are in points of the published score. New patients
    have scikit-learn's columns, which are centred and scaled.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``linear`` (10-1), ``mlp`` (10-32-1), or a module with one output.
        partition: a kind that needs no classes; defaults: 10 clients, test share 0.25.
        seed: seed of the partition and of the test split.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.

    Reference: Efron, Hastie, Johnstone, Tibshirani, *Least Angle Regression*, Annals of Statistics 32, 2004,
    arXiv:math/0406456.
    """
    bunch = load_diabetes()
    table = Table(dict(zip(FEATURES, bunch.data.T, strict=True)), (("diabetes", 1, len(bunch.data)),))
    features_N = INPUTS.transform(table)
    target_N = ((bunch.target - TARGET_CENTER) / TARGET_SCALE).astype(np.float32)
    partition = as_partition(partition, num_clients=10)
    data = partition_arrays(features_N, target_N, partition, task="regression", seed=seed)
    data = replace(data, source="diabetes progression (Efron et al. 2004), from scikit-learn")
    fitted, line = build_trainer(model, data, input_shape=(10,), framework=framework, device=device)
    return Scenario(
        name="diabetes",
        data=data,
        trainer=fitted,
        model=line,
        partition=str(partition),
        preprocessing=PREPROCESSING,
        network=NETWORK,
    )
