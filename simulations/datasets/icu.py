"""Read the first 24 hours of stays in intensive care, from the demo tables of a benchmark or a copy.

Shapes: N stays, R rows of hourly values, 196 columns.

The data are a demo of the eICU database. The tables are the demo tables of YAIB.

References: Pollard et al., *The eICU Collaborative Research Database*, Scientific Data 5, 2018 (demo 2.0.1, ODbL 1.0).
Van de Water et al., *Yet Another ICU Benchmark*, ICLR 2024, arXiv:2306.05109.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np

from fedlearn.data.download import DataSet, LocalCopy, LocatedFiles, OfficialSource, find
from fedlearn.errors import MissingExtra

# fmt: off
HOURLY_COLUMNS = (
    "alb", "alp", "alt", "ast", "be", "bicar", "bili", "bili_dir", "bnd", "bun", "ca", "cai", "ck", "ckmb", "cl",
    "crea", "crp", "dbp", "fgn", "fio2", "glu", "hgb", "hr", "inr_pt", "k", "lact", "lymph", "map", "mch", "mchc",
    "mcv", "methb", "mg", "na", "neut", "o2sat", "pco2", "ph", "phos", "plt", "po2", "ptt", "resp", "sbp", "temp",
    "tnt", "urine", "wbc",
)
# fmt: on
STATIC_COLUMNS = ("age", "sex", "height", "weight")
SUMMARIES = ("mean", "min", "max", "count")
COLUMNS = (*STATIC_COLUMNS, *(f"{name}_{summary}" for name in HOURLY_COLUMNS for summary in SUMMARIES))

# The first stay id of each block. The stay ids of a hospital are a range, and a block has a few adjacent ranges.
BLOCKS = (
    *(0, 300142, 562011, 910049, 1034813, 1247212, 1600008),
    *(2103754, 2552038, 2669317, 2892403, 3060213, 3183245),
)
CSV_FILE = "eicu_demo_mortality24.csv.gz"
ICU_STAYS = DataSet(
    name="eicu-demo-mortality24",
    about="1,367 stays in intensive care, 196 features of the first 24 hours: will the patient die?",
    clients="13 blocks of hospitals",
    licence="ODbL 1.0",
    citation="Pollard et al., The eICU Collaborative Research Database, Scientific Data 5, 2018 (demo 2.0.1)",
    megabytes=0.5,
    origins=(
        OfficialSource(
            base_url="https://raw.githubusercontent.com/rvandewater/YAIB/498950203522f81d67fa94748db23d8eb99ec1ab/"
            "demo_data/mortality24/eicu_demo",
            files={
                "dyn.parquet": "sha256:6f5d2f7f98e80f9e7b104021a01628902f8b5affa590fe1f06e2e9e968c4c9d2",
                "outc.parquet": "sha256:d4c75c926dbfd11eb81a36077d60b498565515eca4f4a914903c2f4ecf3c848f",
                "sta.parquet": "sha256:425a3c2e3893deded0050a8e69f3cabc2fddc5454be8d0bc682a08e644057fcd",
            },
        ),
        LocalCopy(files={CSV_FILE: "sha256:633ec058992d6f97033799a63d9417eee5a09d0b7754ea4b1f38a5b0595d63b6"}),
    ),
)


def read_icu_stays(
    *, path: str | PathLike[str] | None = None, base_url: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Read all 1,367 stays. The copy of the tables has means with four decimals.

    Args:
        path: folder with the three parquet files of the benchmark, or with the CSV copy; None searches for them.
        base_url: mirror of the folder of the benchmark.

    Returns:
        table: ``(1367, 196)``, float64, with the columns ``COLUMNS``. The first four are age (years), sex (1 is male),
            height (cm) and weight (kg). The others are the mean, minimum, maximum and count of each hourly value over
            25 hours. NaN is missing.
        died: ``(1367,)``, 1 for the 70 patients who died in the unit, else 0.
        block: ``(1367,)``, number of the block in 0..12.
        place: source of the files.

    Raises:
        DataError: The files are not available.
        MissingExtra: The files are parquet files, and pyarrow is not installed.
    """
    location = find(ICU_STAYS, path=path, base_url=base_url)
    table_N, died_N, stay_N = _read_csv(location) if CSV_FILE in location.files else _read_parquet(location)
    return table_N, died_N, np.searchsorted(BLOCKS, stay_N, "right") - 1, location.place


def _read_csv(location: LocatedFiles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with gzip.open(location.files[CSV_FILE], "rt", encoding="ascii", newline="") as file:
        rows = list(csv.DictReader(file))
    table_N = np.array([[float(row[column] or "nan") for column in COLUMNS] for row in rows])
    return table_N, np.array([int(row["label"]) for row in rows]), np.array([int(row["stay_id"]) for row in rows])


def _read_parquet(location: LocatedFiles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hours, first, outcome = (_columns(location.files[f"{name}.parquet"]) for name in ("dyn", "sta", "outc"))
    stay_N, stay_of_row = np.unique(hours("stay_id").astype(np.int64), return_inverse=True)
    known = [np.where(first("sex") == "Male", 1.0, 0.0) if name == "sex" else first(name) for name in STATIC_COLUMNS]
    measured = [column for name in HOURLY_COLUMNS for column in _summaries(hours(name), stay_of_row, len(stay_N))]
    return np.stack([*known, *measured], axis=1).astype(np.float64), outcome("label").astype(np.int64), stay_N


def _columns(file: Path) -> Callable[[str], np.ndarray]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("scenario=icu_mortality", "data") from error
    table = parquet.read_table(file)
    return lambda name: table[name].to_numpy()


def _summaries(hourly_R: np.ndarray, stay_R: np.ndarray, num_stays: int) -> list[np.ndarray]:
    """Return the mean, minimum, maximum and count of the measured values of each stay."""
    measured_R = ~np.isnan(hourly_R)
    stay_R, hourly_R = stay_R[measured_R], hourly_R[measured_R]
    count_N = np.bincount(stay_R, minlength=num_stays).astype(np.float64)
    least_N, largest_N = np.full(num_stays, np.nan), np.full(num_stays, np.nan)
    np.fmin.at(least_N, stay_R, hourly_R)
    np.fmax.at(largest_N, stay_R, hourly_R)
    total_N = np.bincount(stay_R, hourly_R, minlength=num_stays)
    mean_N = np.divide(total_N, count_N, out=np.full(num_stays, np.nan), where=count_N > 0)
    return [mean_N, least_N, largest_N, count_N]
