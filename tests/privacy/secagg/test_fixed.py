import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlearn import SettingError
from fedlearn.privacy.secagg.fixed_point import FixedPoint
from fedlearn.privacy.secagg.rotation import max_flattening, next_power_of_two, rotate, unrotate

floats = st.floats(-4.0, 4.0)


@given(arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=floats), st.integers(2, 24))
def test_the_sum_of_encoded_vectors_decodes_to_the_sum_of_clipped_ones_within_rounding(x_KD, bits):
    code = FixedPoint(bound=2.0, bits=bits, max_clients=6)
    total_D = code.wrap(code.encode(x_KD)).sum(axis=0, dtype=code.dtype)
    error_D = code.decode(total_D) - np.clip(x_KD, -2, 2).sum(axis=0)
    assert np.abs(error_D).max() <= len(x_KD) * 0.5 / code.scale * (1 + 1e-9)


@pytest.mark.parametrize(("modulus_bits", "bits", "size"), [(16, 12, 16), (32, 24, 256), (64, 40, 4000)])
def test_the_largest_sum_that_is_allowed_does_not_wrap_around_and_one_client_more_is_refused(modulus_bits, bits, size):
    code = FixedPoint(bound=1.0, bits=bits, modulus_bits=modulus_bits, max_clients=size)
    for sign in (1, -1):
        rows_KD = np.tile(code.wrap(code.encode(np.full(1, sign * 9.0))), (size, 1))
        assert code.decode(rows_KD.sum(axis=0, dtype=code.dtype))[0] == pytest.approx(sign * size, rel=1e-12)
    most = (2 ** (modulus_bits - 1) - 1) // code.max_integer
    FixedPoint(bound=1.0, bits=bits, modulus_bits=modulus_bits, max_clients=most)
    with pytest.raises(SettingError, match="must stay below"):
        FixedPoint(bound=1.0, bits=bits, modulus_bits=modulus_bits, max_clients=most + 1)


def test_noise_needs_room_too():
    FixedPoint(bound=1.0, bits=20, max_clients=1000, noise_std=1e7)
    with pytest.raises(SettingError, match="must stay below"):
        FixedPoint(bound=1.0, bits=20, max_clients=1000, noise_std=2e8)


@pytest.mark.parametrize("length", [1, 2, 3, 64, 100, 1000])
def test_a_rotation_keeps_norms_and_is_undone(length):
    rng = np.random.default_rng(length)
    x_KD = rng.normal(size=(3, length))
    signs_P = rng.choice([-1.0, 1.0], next_power_of_two(length))
    y_KP = rotate(x_KD, signs_P)
    assert np.allclose(np.linalg.norm(y_KP, axis=1), np.linalg.norm(x_KD, axis=1))
    assert np.allclose(unrotate(y_KP[1], signs_P, length), x_KD[1])


def test_a_rotation_spreads_the_worst_vector_as_evenly_as_it_says():
    length = 4096
    spike_KD = np.eye(1, length)
    worst = max(
        np.abs(rotate(spike_KD + noise, np.random.default_rng(seed).choice([-1.0, 1.0], length))).max()
        for seed in range(20)
        for noise in (0, np.eye(1, length, k=7))
    )
    assert worst <= np.sqrt(2) / max_flattening(length)
