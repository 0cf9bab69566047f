"""Models as Flower's records: one array for each leaf, under its name.

Shapes: D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord

from fedlearn.core.layout import Layout


def to_array_record(params_D: np.ndarray, layout: Layout, dtypes: Mapping[str, str] | None = None) -> ArrayRecord:
    """The vector as named arrays, in the order of the layout.

    Args:
        params_D: float32.
        layout: of the vector.
        dtypes: of the arrays, where they are not float32; whole numbers are rounded.
    """
    arrays = {}
    for name, leaf in layout.unpack(params_D).items():
        dtype = np.dtype((dtypes or {}).get(name, "float32"))
        leaf = np.rint(leaf) if dtype.kind in "iub" else leaf
        arrays[name] = Array(np.ascontiguousarray(leaf, dtype).reshape(leaf.shape))
    return ArrayRecord(arrays)


def params_from_record(record: ArrayRecord, layout: Layout) -> np.ndarray:
    """The vector of named arrays, float32.

    Raises:
        ValueError: their names or shapes are not those of the layout.
    """
    return layout.pack({name: array.numpy() for name, array in record.items()})


def layout_from_record(record: ArrayRecord) -> Layout:
    """The layout of a model that comes as named arrays."""
    return Layout.from_shapes((name, tuple(array.shape)) for name, array in record.items())
