"""The scenario `heart`: detect heart disease, at four hospitals.

Shapes: N patients, 13 features.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np

from fedlearn.data.column_types import Number
from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.inputs import TableInputs
from fedlearn.data.partition import Natural, Partition, as_partition, partition_rows
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.tables import Table
from fedlearn.errors import require
from fedlearn.loop.scenario import Scenario, declares_model
from simulations.datasets.uci_heart import COLUMNS, HOSPITALS, read_heart_disease
from simulations.models import build_trainer, network_of

# (centre, spread) of each feature: round clinical reference values, or the middle of a code's range. They are chosen
# without looking at any hospital's data. So scaling reveals nothing about a patient and is the same at every node.
SCALES = {
    "age": (55, 10),  # years
    "sex": (0.5, 0.5),  # female 0, male 1
    "cp": (2.5, 1.5),  # kind of chest pain, 1 to 4
    "trestbps": (130, 20),  # resting systolic pressure, mmHg; hypertension begins at 130 (ACC/AHA 2017)
    "chol": (200, 50),  # serum cholesterol, mg/dl; below 200 is desirable (NCEP ATP III)
    "fbs": (0.5, 0.5),  # fasting blood sugar above 120 mg/dl
    "restecg": (1, 1),  # resting electrocardiogram, 0 to 2
    "thalach": (150, 25),  # highest heart rate in the test; 220 - age is expected
    "exang": (0.5, 0.5),  # angina brought on by exercise
    "oldpeak": (1, 1),  # ST depression, mm; 1 mm counts as a positive test
    "slope": (2, 1),  # slope of the ST segment, 1 to 3
    "ca": (1, 1),  # vessels coloured by fluoroscopy, 0 to 3
    "thal": (5, 2),  # thallium test: 3 normal, 6 fixed, 7 reversible defect
}
ZERO_IS_MISSING = ("trestbps", "chol")  # 0 is impossible; Switzerland wrote 0 for each missing cholesterol
INPUTS = TableInputs(
    columns=tuple(
        Number(name=name, centre=centre, spread=spread, fill=centre, zero_is_missing=name in ZERO_IS_MISSING)
        for name, (centre, spread) in SCALES.items()
    )
)
PREPROCESSING = Preprocessing(
    inputs=INPUTS,
    target=Target(name="disease", task="binary", classes=("no disease", "disease")),
)
SHAPE: dict[str, Any] = {"input_shape": (len(SCALES),), "hidden": (32,)}
NETWORK = network_of(**SHAPE)


@declares_model(lambda settings: (PREPROCESSING, NETWORK))
def heart(
    *,
    framework: str = "torch",
    model: Any = "mlp",
    partition: Partition | str = "natural",
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Detect heart disease: 920 patients, 13 features, four hospitals.

    A missing value is replaced by the centre of its feature, which is zero after scaling. With ``partition=natural``
    the clients are Cleveland 0, Hungarian 1, Switzerland 2 and VA Long Beach 3.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``mlp`` (13-32-1), ``linear``, or a module with one output.
        partition: ``natural`` (one client per hospital) or another kind; defaults: 4 clients, 1 class per client, test
            share 0.25.
        seed: seed of the partition and of the test split.
        path: folder with the files; None searches for them. A hospital's node needs the file of this hospital only. Its
            client then has the same examples as in a simulation, and the other clients have none.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: Detrano et al., *International application of a new probability algorithm for the diagnosis of coronary
    artery disease*, American Journal of Cardiology 64, 1989.
    """
    table_N, hospital_N, place = read_heart_disease(path=path)
    features_N, disease_N = scale_features(table_N), (table_N[:, -1] > 0).astype(np.int64)
    partition = as_partition(partition, num_clients=4, classes_per_client=1)
    is_partial = len(np.unique(hospital_N)) < len(HOSPITALS)
    expected = "natural, because the folder lacks some hospitals"
    require(isinstance(partition, Natural) or not is_partial, "partition", partition, expected, "partition=natural")
    rows_of_hospitals = [np.flatnonzero(hospital_N == number) for number in range(len(HOSPITALS))]
    rows = rows_of_hospitals if is_partial else partition_rows(partition, disease_N, hospital_N, seed=seed)
    data = from_arrays(
        features_N, disease_N, assignment=rows, task="binary", test_share=partition.held_out_share, seed=seed
    )
    names = dict(enumerate(HOSPITALS)) if isinstance(partition, Natural) else {}
    only = f" of {', '.join(HOSPITALS[number] for number in np.unique(hospital_N))} only" if is_partial else ""
    data = replace(data, names=names, source=f"UCI heart disease{only}, from {place}")
    fitted, line = build_trainer(model, data, framework=framework, device=device, **SHAPE)
    return Scenario(
        name="heart",
        data=data,
        trainer=fitted,
        model=line,
        partition=str(partition),
        preprocessing=PREPROCESSING,
        network=NETWORK,
    )


def scale_features(table_N: np.ndarray) -> np.ndarray:
    """Return the features ``(N, 13)`` float32, centered and scaled by constants; missing values are zero."""
    columns = {name: table_N[:, COLUMNS.index(name)] for name in SCALES}
    return INPUTS.transform(Table(columns, (("UCI heart disease", 1, len(table_N)),)))
