"""Read the ratings of MovieLens, in three sizes.

Shapes: R ratings.

The licence allows research only and no redistribution, and requires a citation.

Reference: Harper, Konstan, *The MovieLens Datasets: History and Context*, ACM TiiS 5, 2015, doi:10.1145/2827872.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np

from fedlearn.data.download import Archive, DataSet, OfficialSource, Wheel, find
from fedlearn.errors import did_you_mean, require

GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
TERMS = "research only, do not pass on"
CITATION = "Harper, Konstan, The MovieLens Datasets, ACM TiiS 5, 2015"
ML_100K = DataSet(
    name="movielens-100k",
    about="100,000 ratings of 1,682 films",
    clients="943 users",
    licence=TERMS,
    citation=CITATION,
    megabytes=2.1,
    origins=(
        Wheel(
            name="recbole",
            version="1.2.1",
            sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            members={
                "recbole/dataset_example/ml-100k/ml-100k.inter": "sha256:"
                "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
            },
        ),
        Archive(
            base_url=GROUPLENS,
            name="ml-100k.zip",
            checksum="md5:0e33842e24a9c977be4e0107933c0723",
            members={"ml-100k/u.data": None},
        ),
    ),
)
ML_1M = DataSet(
    name="movielens-1m",
    about="1,000,209 ratings of 3,706 films",
    clients="6,040 users",
    licence=TERMS,
    citation=CITATION,
    megabytes=5.9,
    origins=(
        Archive(
            base_url=GROUPLENS,
            name="ml-1m.zip",
            checksum="md5:c4d9eecfca2ab87c1945afe126590906",
            members={"ml-1m/ratings.dat": None},
        ),
    ),
)
LATEST_SMALL = DataSet(
    name="movielens-latest-small-2016",
    about="100,004 ratings of 9,066 films, in half stars",
    clients="671 users",
    licence=TERMS,
    citation=CITATION,
    origins=(
        OfficialSource(
            base_url="",
            files={
                "movielens_latest_small_2016.npz": "sha256:"
                "f2864138be7745dcad017ffa570eb939dc14b212ee173e1e78235d71898f6d9d"
            },
        ),
    ),
)
VARIANTS: Mapping[str, DataSet] = {"100k": ML_100K, "latest-small": LATEST_SMALL, "1m": ML_1M}


def read_ratings(
    variant: str, *, path: str | PathLike[str] | None = None, base_url: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str]:
    """Read all ratings of a variant.

    Args:
        variant: one of ``VARIANTS``.
        path: folder with the files; None searches for them.
        base_url: mirror of the folder of GroupLens.

    Returns:
        ``user, item, stars, time, place``: four arrays ``(R,)``, and the source of the file. Users and items have
        numbers from 0, in ascending order of their ids.

    Raises:
        SettingError: The variant is unknown.
        DataError: The files are not available.
    """
    guess = did_you_mean(str(variant), VARIANTS) or "100k"
    require(variant in VARIANTS, "size", variant, f"one of {', '.join(VARIANTS)}", f"size={guess}")
    location = find(VARIANTS[variant], path=path, base_url=base_url)
    ((name, file),) = location.files.items()
    user, item, stars, time = _READERS[name](file)
    user_R, item_R = (np.unique(ids, return_inverse=True)[1].ravel() for ids in (user, item))
    return user_R, item_R, stars.astype(np.float32), time, location.place


def _table(file: Path, separator: str, header: bool) -> np.ndarray:
    lines = file.read_text(encoding="ascii").splitlines()[header:]
    return np.array([line.split(separator) for line in lines], np.float64).T


def _npz(file: Path) -> tuple[np.ndarray, ...]:
    with np.load(file, allow_pickle=False) as arrays:
        return arrays["user"], arrays["movie"], arrays["rating2"] / 2, arrays["timestamp"]


_READERS = {
    "ml-100k.inter": lambda file: _table(file, "\t", True),
    "u.data": lambda file: _table(file, "\t", False),
    "ratings.dat": lambda file: _table(file, "::", False),
    "movielens_latest_small_2016.npz": _npz,
}
