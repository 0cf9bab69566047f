"""Bytes of safetensors files, without copies of the arrays."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedlearn.core.serialization import Payload, WireError, pack, unpack
from fedlearn.core.tensor_bytes import DTYPES, LENGTH_BYTES, tensor_parts

ARRAYS = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__" and name.isprintable()),
    hnp.arrays(st.sampled_from(sorted(DTYPES)), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(ARRAYS, st.text(st.characters(exclude_categories=("Cs",)), max_size=12))
def test_the_parts_are_the_bytes_of_the_library(arrays, text):
    assert b"".join(tensor_parts(arrays, {"fedlearn": text})) == save(arrays, metadata={"fedlearn": text})


@settings(max_examples=40, deadline=None)
@given(ARRAYS, st.integers(0, 9), st.booleans())
def test_arrays_come_back_at_any_position_of_the_bytes(arrays, offset, is_writeable):
    data = bytes(offset) + pack(Payload(arrays=arrays))
    found = unpack(memoryview(bytearray(data) if is_writeable else data)[offset:]).arrays
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
        assert found[name].flags.writeable
        assert found[name].flags.aligned


def test_arrays_of_writeable_bytes_are_no_copies():
    data = bytearray(pack(Payload(arrays={"w": np.zeros(4, np.float32)})))
    unpack(memoryview(data)).arrays["w"][0] = 1.0
    assert unpack(data).arrays["w"][0] == 1.0


def changed(**entry):
    header = {
        "__metadata__": {"fedlearn": "{}"},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]} | entry,
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + bytes(12)


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [4, 8]},
        {"data_offsets": [8, 16]},
        {"data_offsets": [9, 12]},
        {"data_offsets": [12, 8]},
        {"data_offsets": [8, 12, 16]},
        {"data_offsets": [-4, 0]},
        {"data_offsets": "8"},
        {"shape": [2]},
        {"shape": [-1]},
        {"shape": [2**62, 4]},
        {"shape": [1.0]},
        {"shape": [True]},
        {"shape": None},
        {"dtype": "F31"},
        {"dtype": ["F32"]},
        {"dtype": "I8"},
        {"shape": [0], "data_offsets": [8, 8]},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_its_bytes_is_refused(entry):
    data = changed(**entry)
    assert unpack(changed()).arrays["a"].shape == (2,)
    with pytest.raises((SafetensorError, TypeError)):
        load(data)  # the library refuses it, too
    with pytest.raises(WireError):
        unpack(data)


def test_a_file_of_another_dtype_is_refused_by_name():
    with pytest.raises(TypeError, match="the array w has dtype object"):
        tensor_parts({"w": np.array([None])}, {})
