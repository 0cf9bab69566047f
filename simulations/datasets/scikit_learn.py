"""Read data sets that scikit-learn contains, without the import of scikit-learn, which takes longer than a short run.

Shapes: N images.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

DIGITS = "datasets/data/digits.csv.gz"  # in the folder of the package
if find_spec("sklearn") is None:
    raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels ``(N, 64)``, float64 from 0 to 16, and the digits ``(N,)``, int64, of ``load_digits``."""
    package = find_spec("sklearn")
    folders = (package and package.submodule_search_locations) or []
    for path in (Path(folder, DIGITS) for folder in folders):
        if path.is_file():
            with gzip.open(path, "rt", encoding="utf-8") as file:
                rows = np.loadtxt(file, delimiter=",")
            return rows[:, :-1], rows[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits  # another version may store the file elsewhere

    pixels, digits = load_digits(return_X_y=True)
    return pixels, digits.astype(np.int64)
