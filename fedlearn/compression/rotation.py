"""Rotate blocks of numbers at random: signs, then a Hadamard matrix, twice.

Shapes: M blocks, B numbers in a block (a power of two).

The arithmetic consists of single additions, subtractions and multiplications in float32, in a fixed order. So all
machines compute the same bits, which no product of matrices in a BLAS library guarantees.
"""

from __future__ import annotations

import numpy as np

BLOCK_SIZE = 4096  # numbers in one rotation
ROWS_PER_CHUNK = 64  # blocks that are rotated at a time; they fit the cache


class RandomRotation:
    """A random rotation of vectors of ``size`` numbers, in blocks of 4096 numbers. The last block is padded with zeros.

    Args:
        size: length of the vectors, >= 1.
        rng: generator of the random signs.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.block_size = min(BLOCK_SIZE, 1 << (size - 1).bit_length())
        self.num_blocks = -(-size // self.block_size)
        num_bytes = -(-self.num_blocks * self.block_size // 8)
        self._bits = [np.frombuffer(rng.bytes(num_bytes), np.uint8) for _ in range(2)]
        exponent = self.block_size.bit_length() - 1  # both factors are powers of two, so their products are exact
        self._factors = [2.0 ** -(exponent // 2), 2.0 ** -(exponent - exponent // 2)]

    def chunks(self) -> range:
        """Return the number of the first block of each chunk."""
        return range(0, self.num_blocks, ROWS_PER_CHUNK)

    def apply(self, blocks_MB: np.ndarray, first: int) -> np.ndarray:
        """Return the rotated blocks, float32. ``first`` is the number of the first block."""
        once_MB = hadamard(blocks_MB * self._signs(0, first, len(blocks_MB)))
        return hadamard(once_MB * self._signs(1, first, len(blocks_MB)))

    def invert(self, blocks_MB: np.ndarray, first: int) -> np.ndarray:
        """Return the blocks before their rotation, float32. ``first`` is the number of the first block."""
        once_MB = hadamard(blocks_MB) * self._signs(1, first, len(blocks_MB))
        return hadamard(once_MB) * self._signs(0, first, len(blocks_MB))

    def _signs(self, number: int, first: int, num_blocks: int) -> np.ndarray:
        """Return plus or minus the factor of one of the two rotations, for some blocks, float32."""
        start, count = first * self.block_size // 8, num_blocks * self.block_size
        bits = np.unpackbits(self._bits[number][start : start - (-count // 8)], count=count)
        factor = np.float32(self._factors[number])
        signs: np.ndarray = factor - 2 * factor * bits.astype(np.float32)
        return signs.reshape(num_blocks, self.block_size)


def hadamard(blocks_MB: np.ndarray) -> np.ndarray:
    """Multiply each row by the Hadamard matrix without normalization. Its square is B times the identity.

    The matrix is the Kronecker product of two smaller ones. The function multiplies by the first, exchanges rows and
    columns of each block, and multiplies by the second. So all additions work on long runs of adjacent numbers.
    """
    num_blocks, width = blocks_MB.shape
    rows = 1 << (width.bit_length() // 2)
    columns = width // rows
    once_MRC = _multiply(blocks_MB.reshape(num_blocks, rows, columns))
    twice_MCR = _multiply(np.ascontiguousarray(once_MRC.swapaxes(1, 2)))
    return np.ascontiguousarray(twice_MCR.swapaxes(1, 2)).reshape(num_blocks, width)


def _multiply(blocks_MRC: np.ndarray) -> np.ndarray:
    """Multiply each block, R x C, by the Hadamard matrix of R rows."""
    num_blocks, rows, columns = blocks_MRC.shape
    source, target, step = blocks_MRC, np.empty_like(blocks_MRC), 1
    while step < rows:
        shape = (num_blocks, rows // (2 * step), 2, step * columns)
        pairs, sums = source.reshape(shape), target.reshape(shape)
        np.add(pairs[:, :, 0], pairs[:, :, 1], out=sums[:, :, 0])
        np.subtract(pairs[:, :, 0], pairs[:, :, 1], out=sums[:, :, 1])
        spare = np.empty_like(target) if source is blocks_MRC else source  # the argument does not change
        source, target, step = target, spare, 2 * step
    return source
