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
from fedlearn.data.column_types import Number
from fedlearn.data.inputs import TableInputs
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.tables import Table
from fedlearn.errors import require
from fedlearn.loop.scenario import Scenario
from simulations.datasets.uci_heart import COLUMNS, HOSPITALS, read_heart_disease
from simulations.models import build_trainer, network_of

DROPPED = ("slope", "ca", "thal")
ONE_HOT = {"cp": (2, 3, 4), "restecg": (1, 2)}  # the first code is the reference category
TRAIN_SHARE = 0.66
SPLIT_SEED = 43
POOLED = "pooled"
TRAINING_SETS = ("hospitals", POOLED, *range(len(HOSPITALS)))  # choices of ``training_set``


def flamby_heart(
    *,
    training_set: str | int = "hospitals",
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
        training_set: ``hospitals`` (four clients), ``pooled`` (one client with all patients, scaled together), or the
            number of the only hospital, 0 to 3. The last two are the benchmark's pooled and local training.
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
    expected = "hospitals, pooled, or the number of a hospital (0 to 3)"
    require(training_set in TRAINING_SETS, "training_set", training_set, expected, "training_set=pooled")
    table_N, hospital_N, place = read_heart_disease(path=path)
    source = f"UCI heart disease (FLamby's 740 patients), from {place}"
    data, inputs = _benchmark(table_N, hospital_N, training_set, source=source)
    fitted, line = build_trainer(model, data, input_shape=(13,), framework=framework, device=device)
    target = Target(name="disease", task="binary", classes=("no disease", "disease"))
    return Scenario(
        name="flamby_heart",
        data=data,
        trainer=fitted,
        model=line,
        preprocessing=Preprocessing(inputs=inputs, target=target),
        network=network_of(input_shape=(13,)),
    )


def _benchmark(
    table_N: np.ndarray, hospital_N: np.ndarray, training_set: str | int, *, source: str
) -> tuple[FederatedData, TableInputs]:
    """Return the data, and the inputs of new patients: the scale of the pooled test set."""
    kept = [column for column, name in enumerate(COLUMNS) if name not in DROPPED]
    complete_N = ~np.isnan(table_N[:, kept]).any(axis=1)
    table_N, disease_N = table_N[complete_N], (table_N[complete_N, -1] > 0).astype(np.int64)
    hospitals = [np.flatnonzero(hospital_N[complete_N] == client) for client in range(len(HOSPITALS))]
    train, test = zip(*(_split(rows, disease_N) for rows in hospitals), strict=True)
    all_train, all_test = np.concatenate(train), np.concatenate(test)
    pooled_inputs = _fitted_inputs(table_N[all_train])
    pooled_test = Examples(pooled_inputs.transform(_table(table_N[all_test])), disease_N[all_test])
    if training_set == POOLED:
        train, test, names = (all_train,), (all_test,), {0: POOLED}
    else:
        names = dict(enumerate(HOSPITALS))

    def part(side: tuple[np.ndarray, ...]) -> list[Examples]:
        return [
            Examples(_fitted_inputs(table_N[train_rows]).transform(_table(table_N[rows])), disease_N[rows])
            for rows, train_rows in zip(side, train, strict=True)
        ]

    clients = [training_set] if isinstance(training_set, int) else range(len(train))
    data = FederatedData(
        task="binary",
        clients=clients,
        train=part(train).__getitem__,
        test=part(test).__getitem__,
        pooled_test=lambda: pooled_test,
        names={client: names[client] for client in clients},
        source=source,
    )
    return data, pooled_inputs


def _table(table_N: np.ndarray) -> Table:
    return Table(dict(zip(COLUMNS, table_N.T, strict=True)), (("UCI heart disease", 1, len(table_N)),))


def _fitted_inputs(table_N: np.ndarray) -> TableInputs:
    """Return inputs that scale each feature by its mean and deviation in these rows."""
    plain = [(name, None) for name in COLUMNS[:-1] if name not in DROPPED and name not in ONE_HOT]
    features = [*plain, *((name, code) for name, codes in ONE_HOT.items() for code in codes)]
    raw = [table_N[:, COLUMNS.index(name)] for name, _ in features]
    values_N = np.stack(
        [column_N if code is None else column_N == code for column_N, (_, code) in zip(raw, features, strict=True)],
        axis=1,
    ).astype(np.float64)
    mean_F, deviation_F = values_N.mean(axis=0), values_N.std(axis=0, ddof=1)
    scales = zip(features, mean_F.tolist(), (deviation_F + 1e-9).tolist(), strict=True)
    columns = (Number(name=name, centre=mean, spread=spread, equals=code) for (name, code), mean, spread in scales)
    return TableInputs(columns=tuple(columns))


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
