import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.core.layout import Layout, default_initial_parameters

shapes = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6), st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5
)


@given(shapes, st.integers(0, 2**32 - 1))
def test_unpacking_and_packing_gives_the_vector_back(shapes, seed):
    layout = Layout.from_shapes(shapes.items())
    params_D = np.random.default_rng(seed).normal(size=layout.num_parameters).astype(np.float32)
    assert np.array_equal(layout.pack(layout.unpack(params_D)), params_D)


@given(shapes)
def test_the_order_in_which_leaves_are_named_does_not_matter(shapes):
    assert Layout.from_shapes(shapes.items()) == Layout.from_shapes(reversed(list(shapes.items())))


def test_the_digest_tells_models_apart():
    digests = {Layout.from_shapes([(name, shape)]).digest for name in "ab" for shape in [(2, 3), (3, 2), (6,)]}
    assert len(digests) == 6


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [({"w": np.zeros((3, 2))}, "shape"), ({"v": np.zeros((2, 3))}, "leaves"), ({}, "leaves")],
)
def test_packing_refuses_tensors_of_another_model(tensors, complaint):
    with pytest.raises(ValueError, match=complaint):
        Layout.from_shapes([("w", (2, 3))]).pack(tensors)


def test_unpacking_refuses_a_vector_of_another_length():
    with pytest.raises(ValueError, match=r"\(5,\), expected \(6,\)"):
        Layout.from_shapes([("w", (2, 3))]).unpack(np.zeros(5, np.float32))


def test_initial_parameters_follow_fan_in_and_leave_normalisation_neutral():
    layout = Layout.from_shapes(
        [("a.weight", (50, 100)), ("a.bias", (50,)), ("norm.weight", (8,)), ("norm.bias", (8,))]
    )
    tensors = layout.unpack(default_initial_parameters(layout, np.random.default_rng(0)))
    assert 0.099 < np.abs(tensors["a.weight"]).max() <= 0.1
    assert 0 < np.abs(tensors["a.bias"]).max() <= 0.1
    assert tensors["a.weight"].std() == pytest.approx(0.1 / np.sqrt(3), rel=0.05)
    assert (tensors["norm.weight"] == 1).all()
    assert (tensors["norm.bias"] == 0).all()
