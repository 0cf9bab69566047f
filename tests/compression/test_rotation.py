"""A random rotation keeps norms, has an inverse, and gives the same bits on all machines."""

from hashlib import sha256

import numpy as np
import pytest

from fedlearn.compression import codecs
from fedlearn.compression.rotation import BLOCK_SIZE, ROWS_PER_CHUNK, RandomRotation, hadamard
from fedlearn.core import threads
from fedlearn.core.layout import Layout


def sylvester(width):
    """Return the Hadamard matrix by its definition."""
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@pytest.mark.parametrize("exponent", range(13))
def test_a_fast_product_is_the_product_with_the_hadamard_matrix(exponent):
    blocks_MB = np.random.default_rng(0).standard_normal((3, 2**exponent)).astype(np.float32)
    before = blocks_MB.copy()
    expected_MB = blocks_MB.astype(np.float64) @ sylvester(2**exponent)
    assert np.allclose(hadamard(blocks_MB), expected_MB, atol=1e-5 * 2**exponent)
    assert np.array_equal(blocks_MB, before), "the argument does not change"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 1000, BLOCK_SIZE, BLOCK_SIZE + 1, 70 * BLOCK_SIZE - 5])
def test_a_rotation_keeps_the_norm_and_has_an_inverse(size):
    rotation = RandomRotation(size, np.random.default_rng(0))
    blocks_MB = np.random.default_rng(1).standard_normal((rotation.num_blocks, rotation.block_size)).astype(np.float32)
    for first in rotation.chunks():
        some_MB = blocks_MB[first : first + ROWS_PER_CHUNK]
        rotated_MB = rotation.apply(some_MB, first)
        assert rotated_MB.dtype == np.float32
        assert np.allclose(np.linalg.norm(rotated_MB, axis=1), np.linalg.norm(some_MB, axis=1), rtol=1e-5)
        assert np.allclose(rotation.invert(rotated_MB, first), some_MB, atol=1e-5)


def test_blocks_have_different_signs_in_each_chunk_and_each_rotation():
    rotation = RandomRotation(200 * BLOCK_SIZE, np.random.default_rng(0))
    rows = [rotation._signs(number, first, 1) for number in (0, 1) for first in (0, 1, ROWS_PER_CHUNK, 199)]
    correlations = np.corrcoef(np.concatenate(rows))
    assert np.abs(correlations - np.eye(len(rows))).max() < 0.1


def test_decoded_values_have_the_same_bits_on_all_machines_and_with_any_number_of_threads(monkeypatch):
    """Check a pinned digest: a node continues with its decoded value, and the coordinator decodes the same bytes."""
    layout, levels = Layout.from_shapes([("w", (300_000,))]), np.random.default_rng(0).integers(0, 256, 37_888)
    scales = np.linspace(0.5, 2.0, 74, dtype="<f4").tobytes()
    payload = scales + b"\x00" + levels.astype(np.uint8).tobytes()
    digests = set()
    for count in (1, 3):
        monkeypatch.setattr(threads, "num_threads", lambda count=count: count)
        decoded_D = codecs.eden().codec.decode(payload, layout, np.random.default_rng(1))
        digests.add(sha256(decoded_D.astype("<f4").tobytes()).hexdigest()[:16])
    assert digests == {"fc372007ba355127"}
