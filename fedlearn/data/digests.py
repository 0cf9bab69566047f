"""Compute digests of the training data, so that a resumed run detects a change.

A digest of few rows can reveal them to a reader who tries all possible rows. So digests stay with the run, and no file
of the trained model contains them.

Shapes: N rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.data.tables import Table


def digests_of_table(table: Table) -> dict[str, str]:
    """Return the number of rows of each file, and a digest of each column of each file.

    >>> list(digests_of_table(Table({"x": np.array([1.0])}, (("a.csv", 2, 1),))))
    ['rows of a.csv', 'column x of a.csv']
    """
    digests, start = {}, 0
    for file, _, count in table.origins:
        digests[f"rows of {file}"] = str(count)
        for name, cells_N in table.columns.items():
            digests[f"column {name} of {file}"] = _digest_of_cells(cells_N[start : start + count])
        start += count
    return digests


def digests_of_images(classes: Table, images_N: np.ndarray) -> dict[str, str]:
    """Return a digest of each image by the name of its file, which contains client and class."""
    return {
        f"image {name}": _sha256(pixels.tobytes())
        for (name, _, _), pixels in zip(classes.origins, images_N, strict=True)
    }


def digests_of_clients(data: FederatedData) -> dict[str, str]:
    """Return a digest of the training and the held-out examples of each client."""
    digests = {}
    for client in data.clients:
        for part, examples in (("training", data.train(client)), ("held-out", data.test(client))):
            arrays = (np.ascontiguousarray(examples.x), np.ascontiguousarray(examples.y))
            digests[f"{part} examples of client {data.name(client)}"] = _sha256(*arrays)
    return digests


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the parts that differ, in the order of the earlier digests, then new parts.

    >>> changes({"a": "1", "b": "2"}, {"a": "3", "c": "4"})
    ['a', 'b (missing now)', 'c (new)']
    """
    changed = [name if name in now else f"{name} (missing now)" for name in before if before[name] != now.get(name)]
    return changed + [f"{name} (new)" for name in now if name not in before]


def _digest_of_cells(cells_N: np.ndarray) -> str:
    if cells_N.dtype != object:
        return _sha256(np.ascontiguousarray(cells_N))
    return _sha256("\x1f".join("\x00" if cell is None else str(cell) for cell in cells_N).encode())


def _sha256(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()
