"""The scenario `diabetes`: predict the progression of diabetes; linear models do well.

Shapes: N patients, 10 features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.datasets import load_diabetes

from fedlearn.data.from_arrays import partition_arrays
from fedlearn.data.partition import Partition, as_partition
from fedlearn.loop.scenario import Scenario
from simulations.models import build_trainer

# each published feature has unit norm over all 442 patients; times sqrt(442) it has unit variance
FEATURE_SCALE = 442**-0.5
# round public constants, not fitted to any client; scores range from 25 to 346
TARGET_CENTER, TARGET_SCALE = 150.0, 100.0


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

    The target is ``(score - 150) / 100``, so an error of 0.5 is 50 points of the published score.

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
    features_N = (bunch.data / FEATURE_SCALE).astype(np.float32)
    target_N = ((bunch.target - TARGET_CENTER) / TARGET_SCALE).astype(np.float32)
    partition = as_partition(partition, num_clients=10)
    data = partition_arrays(features_N, target_N, partition, task="regression", seed=seed)
    data = replace(data, source="diabetes progression (Efron et al. 2004), from scikit-learn")
    fitted, line = build_trainer(model, data, input_shape=(10,), framework=framework, device=device)
    return Scenario(name="diabetes", data=data, trainer=fitted, model=line, partition=str(partition))
