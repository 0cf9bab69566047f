"""Arrays that are read quickly equal the arrays that Flower reads."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed")
from flwr.app import Array

from fedlearn.flower.fast_array import FastArray
from fedlearn.flower.in_process_grid import copy_records

RNG = np.random.default_rng(0)
ARRAYS = {
    "matrix": RNG.normal(size=(3, 4)).astype(np.float32),
    "by columns": np.asfortranarray(RNG.normal(size=(3, 4))),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 5), np.float16),
    "truths": np.array([True, False]),
    "big endian": np.arange(3, dtype=">i4"),
    "words": np.array(["a", "bc"]),
    "fields": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
}


def quick(array):
    return FastArray(array.dtype, array.shape, array.stype, array.data)


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_the_same_and_its_own(name):
    array = Array(ARRAYS[name])
    found, expected = quick(array).numpy(), array.numpy()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.flags.f_contiguous == expected.flags.f_contiguous
    assert np.array_equal(found, expected)
    assert found.flags.writeable
    assert found.flags.owndata


def test_another_serialization_is_left_to_flower():
    with pytest.raises(TypeError, match="other"):
        FastArray("float32", (1,), "other", b"0000").numpy()


def test_what_is_cut_short_is_refused():
    with pytest.raises((ValueError, TypeError)):
        FastArray("float32", (4,), "numpy.ndarray", Array(np.zeros(4, np.float32)).data[:-4]).numpy()


def test_apps_get_quick_arrays():
    from flwr.app import ArrayRecord, RecordDict

    (item,) = copy_records(RecordDict({"arrays": ArrayRecord([ARRAYS["matrix"]])}))["arrays"].values()
    assert isinstance(item, FastArray)
    assert np.array_equal(item.numpy(), ARRAYS["matrix"])
