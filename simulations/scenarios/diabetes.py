"""Progression of diabetes: a regression that linear models do well on.

Shapes: N patients, 10 features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.datasets import load_diabetes

from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.partition import Partition, partition_rows
from fedlearn.loop.scenario import Scenario
from simulations.models import build_trainer

# the published features have unit length over all 442 patients: times sqrt(442) they have unit spread
FEATURE_SCALE = 442**-0.5
# round public constants (the score runs from 25 to 346), not fitted to any client
TARGET_CENTER, TARGET_SCALE = 150.0, 100.0


def diabetes(
    *,
    framework: str = "torch",
    model: Any = "linear",
    partition: str = "iid",
    num_clients: int = 10,
    test_share: float = 0.25,
    seed: int = 1,
    device: str = "cpu",
) -> Scenario:
    """How far will the disease have gone in a year? 442 patients, 10 features; ships with scikit-learn.

    The target is ``(score - 150) / 100``, so an error of 0.5 is 50 points of the published score.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``linear`` (10-1), ``mlp`` (10-32-1), or a module of your own with one output.
        partition: ``iid``; the others need classes or a natural division, which these data lack.
        num_clients: in 1..442.
        test_share: held out at each client, in [0, 1).
        seed: of partition and split.
        device: where to compute.

    Raises:
        SettingError: a setting is out of range.

    Reference: Efron, Hastie, Johnstone, Tibshirani, *Least Angle Regression*, Annals of Statistics 32, 2004,
    arXiv:math/0406456.
    """
    bunch = load_diabetes()
    features_N = (bunch.data / FEATURE_SCALE).astype(np.float32)
    target_N = ((bunch.target - TARGET_CENTER) / TARGET_SCALE).astype(np.float32)
    how = Partition(kind=partition, num_clients=num_clients, seed=seed)
    rows = partition_rows(how, target_N)
    data = from_arrays(features_N, target_N, assignment=rows, task="regression", test_share=test_share, seed=seed)
    data = replace(data, source="diabetes progression (Efron et al. 2004), from scikit-learn")
    fitted, line = build_trainer(model, data, input_shape=(10,), framework=framework, device=device)
    return Scenario(name="diabetes", data=data, trainer=fitted, model=line, partition=str(how))
