"""Convert a model vector to Flower's `ArrayRecord` and back, with one named array per leaf.

Shapes: D parameters, flattened.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord

from fedlearn.core.layout import Layout


def to_array_record(params_D: np.ndarray, layout: Layout, dtypes: Mapping[str, str] | None = None) -> ArrayRecord:
    """Return the model vector as named arrays, in the order of the layout.

    Args:
        params_D: model vector, float32.
        layout: layout of the vector.
        dtypes: dtypes of arrays that are not float32, by name. Integer arrays are rounded.
    """
    arrays = {}
    for name, leaf in layout.unpack(params_D).items():
        dtype = np.dtype((dtypes or {}).get(name, "float32"))
        leaf = np.rint(leaf) if dtype.kind in "iub" else leaf
        arrays[name] = Array(np.ascontiguousarray(leaf, dtype).reshape(leaf.shape))
    return ArrayRecord(arrays)


def params_from_record(record: ArrayRecord, layout: Layout) -> np.ndarray:
    """Return the model vector of named arrays, float32.

    Args:
        record: named arrays, in any order.
        layout: layout of the vector.

    Raises:
        ValueError: names or shapes differ from the layout.
    """
    return layout.pack({name: array.numpy() for name, array in record.items()})


def layout_from_record(record: ArrayRecord) -> Layout:
    """Return the layout of a model with these named arrays."""
    return Layout.from_shapes((name, tuple(array.shape)) for name, array in record.items())
