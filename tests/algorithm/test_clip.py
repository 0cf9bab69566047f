import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlearn import SettingError, clip
from fedlearn.algorithm import clip_norm

rows = arrays(np.float32, (4, 6), elements=st.floats(-1e4, 1e4, width=32))


@given(rows, st.floats(1e-3, 1e3))
def test_a_clipped_update_is_no_longer_than_the_bound_and_points_the_same_way(update_KD, bound):
    clipped_KD = clip_norm(update_KD, bound)
    assert (np.linalg.norm(clipped_KD.astype(np.float64), axis=1) <= bound * (1 + 1e-5)).all()
    cosine = (clipped_KD.astype(np.float64) * update_KD).sum(axis=1)
    assert (cosine >= 0).all()


@given(rows, st.floats(1e-3, 1e3))
def test_clipping_twice_is_clipping_once_and_short_updates_stay(update_KD, bound):
    once_KD = clip_norm(update_KD, bound)
    assert np.allclose(clip_norm(once_KD, bound), once_KD, rtol=1e-5)
    short_K = np.linalg.norm(update_KD.astype(np.float64), axis=1) <= bound * (1 - 1e-6)
    assert np.array_equal(once_KD[short_K], update_KD[short_K])


@given(rows, rows, st.floats(1e-2, 1e2))
def test_clipping_never_moves_two_updates_further_apart(a_KD, b_KD, bound):
    before = np.linalg.norm(a_KD.astype(np.float64) - b_KD, axis=1)
    after = np.linalg.norm(clip_norm(a_KD, bound).astype(np.float64) - clip_norm(b_KD, bound), axis=1)
    assert (after <= before * (1 + 1e-4) + 1e-5 * bound).all()


def test_a_zero_update_stays_zero():
    assert not clip_norm(np.zeros((2, 3), np.float32), 1.0).any()


@pytest.mark.parametrize("bound", [0, -1, float("nan"), float("inf"), "one"])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(SettingError, match="clip"):
        clip(bound)
