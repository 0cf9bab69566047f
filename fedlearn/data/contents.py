"""Hold the contents of a folder or a data set: rows or images, their clients and their splits.

Shapes: N rows or images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlearn.data.levels import to_category
from fedlearn.data.tables import Table

CLASS_COLUMN = "class"  # column with the folder name of each image


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Hold the contents of a folder.

    Args:
        table: one row per example; for images, the column of classes or the table with their labels.
        clients: name of the client of each row; None if file names do not say it.
        test_N: mask of the rows of a test split; None without such a split.
        validation_N: mask of the rows of a validation split; None without such a split.
        groups: name of the group of each row, from folders; None without groups.
        images: ``(N, height, width, channels)``: uint8, uint16, or float32 for values of any range; or None.
        notes: statements about the reading of files, for the header.
    """

    table: Table
    clients: np.ndarray | None
    test_N: np.ndarray | None
    validation_N: np.ndarray | None = None
    groups: np.ndarray | None = None
    images: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def clients_of_rows(table: Table, column: str) -> np.ndarray:
    """Return the client of each row, from the column that names it.

    Raises:
        DataError: there is no such column, or a cell is missing.
    """
    cells_N = table.column(column, "scenario.client")
    missing_N = np.array([cell is None or cell != cell for cell in cells_N], bool)
    table.refuse(missing_N, column, "missing, but this column names the client", "the name of a client in this cell")
    return np.array([to_category(cell) for cell in cells_N.tolist()], object)


def mask_or_none(mask_N: np.ndarray) -> np.ndarray | None:
    """Return a mask, or None if it selects no row."""
    return mask_N if mask_N.any() else None
