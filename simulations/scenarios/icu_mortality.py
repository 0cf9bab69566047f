"""The scenario `icu_mortality`: predict death in intensive care, at thirteen groups of hospitals.

Shapes: N stays, 196 features.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np

from fedlearn.core.layout import Layout, default_initial_parameters
from fedlearn.data.column_types import Number
from fedlearn.data.from_arrays import partition_arrays
from fedlearn.data.inputs import TableInputs
from fedlearn.data.partition import Natural, Partition, as_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.tables import Table
from fedlearn.loop.scenario import Scenario, declares_model
from simulations.datasets.icu import BLOCKS, COLUMNS, read_icu_stays
from simulations.models import build_trainer, network_of

# (centre, spread) of each value: the middle of the reference range of healthy adults, and about half its width.
# The source is laboratories and textbooks; no stay is used. So scaling reveals nothing about a patient and is the same
# at every node.
SCALES = {
    "age": (60, 20),  # years
    "sex": (0.5, 0.5),  # female 0, male 1
    "height": (170, 10),  # cm
    "weight": (80, 20),  # kg
    "alb": (4, 0.5),  # albumin, g/dl
    "alp": (80, 40),  # alkaline phosphatase, U/l
    "alt": (25, 20),  # alanine aminotransferase, U/l
    "ast": (25, 15),  # aspartate aminotransferase, U/l
    "be": (0, 2),  # base excess, mmol/l
    "bicar": (25, 3),  # bicarbonate, mmol/l
    "bili": (0.7, 0.5),  # bilirubin, mg/dl
    "bili_dir": (0.15, 0.15),  # bilirubin, conjugated, mg/dl
    "bnd": (3, 3),  # band neutrophils, %
    "bun": (14, 6),  # urea nitrogen, mg/dl
    "ca": (9.5, 0.5),  # calcium, mg/dl
    "cai": (1.2, 0.1),  # calcium, ionised, mmol/l
    "ck": (100, 80),  # creatine kinase, U/l
    "ckmb": (2.5, 2.5),  # creatine kinase MB, ng/ml
    "cl": (102, 4),  # chloride, mmol/l
    "crea": (0.9, 0.3),  # creatinine, mg/dl
    "crp": (5, 5),  # C-reactive protein, mg/l
    "dbp": (70, 10),  # diastolic pressure, mmHg
    "fgn": (300, 100),  # fibrinogen, mg/dl
    "fio2": (21, 20),  # oxygen breathed in, %; 21 is air
    "glu": (100, 30),  # glucose, mg/dl
    "hgb": (14, 2),  # haemoglobin, g/dl
    "hr": (80, 20),  # heart rate, 1/min
    "inr_pt": (1, 0.2),  # prothrombin time, ratio
    "k": (4.25, 0.75),  # potassium, mmol/l
    "lact": (1.2, 0.8),  # lactate, mmol/l
    "lymph": (30, 10),  # lymphocytes, %
    "map": (85, 15),  # mean pressure, mmHg
    "mch": (30, 3),  # haemoglobin of a red cell, pg
    "mchc": (34, 2),  # haemoglobin concentration of red cells, g/dl
    "mcv": (90, 10),  # volume of a red cell, fl
    "methb": (1, 1),  # methaemoglobin, %
    "mg": (2, 0.3),  # magnesium, mg/dl
    "na": (140, 5),  # sodium, mmol/l
    "neut": (55, 15),  # neutrophils, %
    "o2sat": (97, 3),  # oxygen saturation, %
    "pco2": (40, 5),  # carbon dioxide, arterial, mmHg
    "ph": (7.4, 0.05),  # arterial
    "phos": (3.5, 1),  # phosphate, mg/dl
    "plt": (275, 125),  # platelets, 1000/ul
    "po2": (90, 10),  # oxygen, arterial, mmHg
    "ptt": (30, 5),  # partial thromboplastin time, s
    "resp": (16, 4),  # breaths, 1/min
    "sbp": (120, 20),  # systolic pressure, mmHg
    "temp": (36.8, 0.5),  # degrees Celsius
    "tnt": (0.01, 0.02),  # troponin T, ng/ml
    "urine": (60, 40),  # ml/h
    "wbc": (7.5, 3.5),  # white cells, 1000/ul
}
NUM_HOURS = 25  # hours in which a value can be measured
# mortality that intensive care units typically report; otherwise the first rounds would only learn this rate
PRIOR_MORTALITY = 0.1


def _column(name: str) -> Number:
    if name.endswith("_count"):
        return Number(name=name, spread=float(np.log1p(NUM_HOURS)), fill=0.0, scaling="log1p")
    centre, spread = SCALES[name if name in SCALES else name.rpartition("_")[0]]
    return Number(name=name, centre=centre, spread=spread, fill=centre, scaling="arcsinh")


INPUTS = TableInputs(columns=tuple(map(_column, COLUMNS)))
PREPROCESSING = Preprocessing(
    inputs=INPUTS,
    target=Target(name="outcome", task="binary", classes=("survival", "death")),
)
SHAPE: dict[str, Any] = {"input_shape": (len(COLUMNS),), "hidden": (32,)}
NETWORK = network_of(**SHAPE)


@declares_model(lambda settings: (PREPROCESSING, NETWORK))
def icu_mortality(
    *,
    framework: str = "torch",
    model: Any = "linear",
    partition: Partition | str = "natural",
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Predict death in intensive care: 1,367 stays, 70 deaths, 196 features of the first 24 hours.

    With ``partition=natural`` each client is a block of hospitals with neighbouring numbers, with 51 to 182 stays. One
    stay in twenty is positive. So a model that always predicts survival has an accuracy of 0.95; use AUC and AUPRC.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``linear`` (196-1, logistic regression), ``mlp`` (196-32-1), or a module with one output.
        partition: ``natural`` (blocks of hospitals) or another kind; defaults: 13 clients, 1 class per client, test
            share 0.25.
        seed: seed of the partition and of the test split.
        path: folder with the data; None searches for them.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: Pollard et al., *The eICU Collaborative Research Database*, Scientific Data 5, 2018.
    Task: van de Water et al., *Yet Another ICU Benchmark*, ICLR 2024, arXiv:2306.05109.
    """
    table_N, died_N, block_N, place = read_icu_stays(path=path)
    partition = as_partition(partition, num_clients=13, classes_per_client=1)
    data = partition_arrays(scale_features(table_N), died_N, partition, task="binary", natural_N=block_N, seed=seed)
    names = {block: f"block {block}" for block in range(len(BLOCKS))} if isinstance(partition, Natural) else {}
    data = replace(data, names=names, source=f"eICU demo (YAIB's task mortality24), from {place}")
    initial = initial_params if isinstance(model, str) else None
    fitted, line = build_trainer(model, data, framework=framework, device=device, initial=initial, **SHAPE)
    return Scenario(
        name="icu_mortality",
        data=data,
        trainer=fitted,
        model=line,
        metric="auc",
        partition=str(partition),
        preprocessing=PREPROCESSING,
        network=NETWORK,
    )


def initial_params(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Return parameters with which the model predicts `PRIOR_MORTALITY` for each patient."""
    tensors = layout.unpack(default_initial_parameters(layout, rng))
    odds = np.full(1, np.log(PRIOR_MORTALITY / (1 - PRIOR_MORTALITY)), np.float32)
    return layout.pack({**tensors, "out.weight": np.zeros_like(tensors["out.weight"]), "out.bias": odds})


def scale_features(table_N: np.ndarray) -> np.ndarray:
    """Return the features, ``(N, 196)`` float32. A missing value and the middle of the reference range are zero.

    Values become ``arcsinh((value - centre) / spread)``, which is linear within the range and logarithmic far from it.
    Counts become ``log(1 + count) / log(1 + NUM_HOURS)``, in [0, 1].
    """
    columns = dict(zip(COLUMNS, table_N.T, strict=True))
    return INPUTS.transform(Table(columns, (("eICU", 1, len(table_N)),)))
