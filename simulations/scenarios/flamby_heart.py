"""The scenario `flamby_heart`: detect heart disease as in the FLamby benchmark, to compare with published results.

Shapes: N patients, 13 features.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import Examples
from fedlearn.loop.scenario import Scenario
from simulations.datasets.uci_heart import COLUMNS, HOSPITALS, read_heart_disease
from simulations.models import build_trainer

DROPPED = ("slope", "ca", "thal")
ONE_HOT = {"cp": (2, 3, 4), "restecg": (1, 2)}  # the first code is the reference category
TRAIN_SHARE = 0.66
SPLIT_SEED = 43


def flamby_heart(
    *,
    framework: str = "torch",
    model: Any = "linear",
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Build FLamby's Fed-Heart-Disease: 740 patients with complete features, split 66 to 34.

    The features slope, ca and thal are dropped, and so is each patient with another missing value.

    Each hospital scales its patients by its own training mean and deviation. The pooled test set has 254 patients. It
    is scaled by the mean and deviation of all 486 training patients. Published accuracies refer to this test set. A
    cholesterol of 0 stays 0, as in the benchmark. Published settings: batches of 4, 100 local steps, 15 rounds, SGD at
    0.001.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``linear`` (13-1, logistic regression, as in the benchmark), ``mlp``, or a module.
        path: folder with the files; None searches for them.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: Ogier du Terrail et al., *FLamby: Datasets and Benchmarks for Cross-Silo Federated Learning in Realistic
    Healthcare Settings*, NeurIPS 2022, arXiv:2210.04620.
    """
    table_N, hospital_N, place = read_heart_disease(path=path)
    data = _benchmark(table_N, hospital_N, source=f"UCI heart disease (FLamby's 740 patients), from {place}")
    fitted, line = build_trainer(model, data, input_shape=(13,), framework=framework, device=device)
    return Scenario(name="flamby_heart", data=data, trainer=fitted, model=line)


def _benchmark(table_N: np.ndarray, hospital_N: np.ndarray, *, source: str) -> FederatedData:
    kept = [column for column, name in enumerate(COLUMNS) if name not in DROPPED]
    complete_N = ~np.isnan(table_N[:, kept]).any(axis=1)
    features_N, disease_N = _features(table_N[complete_N]), (table_N[complete_N, -1] > 0).astype(np.int64)
    hospitals = [np.flatnonzero(hospital_N[complete_N] == client) for client in range(len(HOSPITALS))]
    train, test = zip(*(_split(rows, disease_N) for rows in hospitals), strict=True)
    all_train, all_test = np.concatenate(train), np.concatenate(test)
    pooled_test = Examples(_standardize(features_N[all_test], features_N[all_train]), disease_N[all_test])

    def part(side: tuple[np.ndarray, ...]) -> list[Examples]:
        return [
            Examples(_standardize(features_N[rows], features_N[train_rows]), disease_N[rows])
            for rows, train_rows in zip(side, train, strict=True)
        ]

    return FederatedData(
        task="binary",
        clients=range(len(HOSPITALS)),
        train=part(train).__getitem__,
        test=part(test).__getitem__,
        pooled_test=lambda: pooled_test,
        names=dict(enumerate(HOSPITALS)),
        source=source,
    )


def _features(table_N: np.ndarray) -> np.ndarray:
    plain = [name for name in COLUMNS[:-1] if name not in DROPPED and name not in ONE_HOT]
    columns = [table_N[:, COLUMNS.index(name)] for name in plain]
    columns += [table_N[:, COLUMNS.index(name)] == code for name, codes in ONE_HOT.items() for code in codes]
    return np.stack(columns, axis=1).astype(np.float64)


def _split(rows: np.ndarray, disease_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the training and test rows of a hospital, in the order of its file as in the benchmark."""
    classes, counts = np.unique(disease_N[rows], return_counts=True)
    stratified = len(classes) > 1 and counts.min() > 2
    train, test = train_test_split(
        rows,
        test_size=1 - TRAIN_SHARE,
        train_size=TRAIN_SHARE,
        random_state=SPLIT_SEED,
        stratify=disease_N[rows] if stratified else None,
    )
    return np.sort(train), np.sort(test)


def _standardize(features_N: np.ndarray, reference_N: np.ndarray) -> np.ndarray:
    mean, deviation = reference_N.mean(axis=0), reference_N.std(axis=0, ddof=1)
    return ((features_N - mean) / (deviation + 1e-9)).astype(np.float32)
