"""Compress updates: codecs that encode the update of a client as bytes and decode it again.

Shapes: D parameters, flattened; M blocks of parameters, B numbers in a block.

A codec is a pair of functions on the vector of one client. The client decodes its own bytes and continues with the
decoded value. A simulation therefore equals a deployment bit for bit. Random numbers that both sides need (coordinates,
rotations) derive from seed, round and client of the request, and are not sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache, lru_cache
from math import prod
from statistics import NormalDist

import numpy as np

from fedlearn.algorithm.server_optimizers import zeros
from fedlearn.algorithm.transforms import Codec, Stage, Transform
from fedlearn.compression.bit_packing import pack_indices, pack_levels, unpack_indices, unpack_levels
from fedlearn.compression.bit_packing import require_valid as expect
from fedlearn.compression.rotation import ROWS_PER_CHUNK, RandomRotation
from fedlearn.core.layout import Layout, Leaf
from fedlearn.core.threads import map_in_threads
from fedlearn.errors import is_count, is_number, require

Rng = np.random.Generator
FORMATS = ("float16", "bfloat16")


@lru_cache(maxsize=16)
def none() -> Stage:
    """Return a stage without compression: four bytes per parameter."""
    return Stage()


def topk(*, share: float = 0.01, error_feedback: bool = True) -> Stage:
    """Return top-k: send the largest numbers of an update with their coordinates.

    Args:
        share: share of the parameters that are sent, in (0, 1]; at least one parameter is sent.
        error_feedback: whether a client adds its encoding error to its next update.

    *Guarantees*: the norm of the encoding error is at most ``sqrt(1 - share)`` times the norm of the update. The
    decoded update is never longer than the update. Without error feedback it may therefore follow a clip.

    Reference: Stich, Cordonnier, Jaggi, *Sparsified SGD with Memory*, NeurIPS 2018, arXiv:1809.07599.
    """
    _require_share(share)

    def encode(vector_D: np.ndarray, layout: Layout, rng: Rng) -> bytes:
        num_kept = _count(share, len(vector_D))
        largest = np.sort(np.argpartition(np.abs(vector_D), len(vector_D) - num_kept)[len(vector_D) - num_kept :])
        return vector_D[largest].astype("<f4").tobytes() + pack_indices(largest, len(vector_D))

    def decode(payload: bytes, layout: Layout, rng: Rng) -> np.ndarray:
        size = layout.num_parameters
        num_kept = _count(share, size)
        vector_D = np.zeros(size, np.float32)
        vector_D[unpack_indices(payload[4 * num_kept :], num_kept, size)] = _floats(payload[: 4 * num_kept], num_kept)
        return vector_D

    return _stage(Codec(encode, decode), error_feedback=error_feedback, contracts=not error_feedback)


def randomk(*, share: float = 0.01, error_feedback: bool = True) -> Stage:
    """Return random-k: send the values at random coordinates, which both sides derive from the seed.

    Args:
        share: share of the parameters that are sent, in (0, 1]; at least one parameter is sent.
        error_feedback: whether a client adds its encoding error to its next update. Without it, values are multiplied
            by ``1 / share``.

    *Guarantees*: unbiased without error feedback.

    Reference: Stich, Cordonnier, Jaggi, *Sparsified SGD with Memory*, NeurIPS 2018, arXiv:1809.07599; unbiased:
    Wangni, Wang, Liu, Zhang, *Gradient Sparsification*, NeurIPS 2018, arXiv:1710.09854.
    """
    _require_share(share)

    def draw_indices(size: int, rng: Rng) -> np.ndarray:
        return np.sort(rng.choice(size, _count(share, size), replace=False))

    def encode(vector_D: np.ndarray, layout: Layout, rng: Rng) -> bytes:
        return vector_D[draw_indices(len(vector_D), rng)].astype("<f4").tobytes()

    def decode(payload: bytes, layout: Layout, rng: Rng) -> np.ndarray:
        vector_D = np.zeros(layout.num_parameters, np.float32)
        indices = draw_indices(len(vector_D), rng)
        scale = 1.0 if error_feedback else len(vector_D) / len(indices)
        vector_D[indices] = _floats(payload, len(indices)) * np.float32(scale)
        return vector_D

    return _stage(Codec(encode, decode), error_feedback=error_feedback)


def qsgd(*, levels: int = 16, bucket: int = 512) -> Stage:
    """Return QSGD: round each number at random to one of its two neighbouring levels.

    A bucket of numbers has ``levels`` equal steps between zero and its L2 norm.

    Args:
        levels: number of steps ``s``, in 1..127.
        bucket: numbers that share a norm, >= 1.

    *Guarantees*: unbiased; the variance is at most ``min(bucket / s^2, sqrt(bucket) / s)`` times the squared norm.

    Reference: Alistarh, Grubic, Li, Tomioka, Vojnovic, *QSGD: Communication-Efficient SGD via Gradient Quantization and
    Encoding*, NeurIPS 2017, arXiv:1610.02132. Levels are packed or deflated; the paper uses Elias coding.
    """
    require(is_count(levels) and levels <= 127, "levels", levels, "a whole number in 1..127", "levels=16")
    require(is_count(bucket), "bucket", bucket, "a whole number >= 1", "bucket=512")

    def bounds(layout: Layout) -> np.ndarray:
        return np.arange(0, layout.num_parameters, bucket)

    return _stage(_stochastic_rounding(levels, bounds, lambda part: float(np.linalg.norm(part.astype(np.float64)))))


def terngrad() -> Stage:
    """Return TernGrad: round each number at random to zero, or to plus or minus the largest magnitude of its tensor.

    *Guarantees*: unbiased.

    Reference: Wen, Xu, Yan, Wu, Wang, Chen, Li, *TernGrad: Ternary Gradients to Reduce Communication in Distributed
    Deep Learning*, NeurIPS 2017, arXiv:1705.07878 (layer by layer, without its clipping, which adds a bias).
    """

    def bounds(layout: Layout) -> np.ndarray:
        return np.cumsum([0, *(leaf.size for leaf in layout.leaves)])[:-1]

    return _stage(_stochastic_rounding(1, bounds, lambda part: float(np.abs(part).max(initial=0))))


def half(*, format: str = "float16") -> Stage:
    """Return half precision: send two bytes per number.

    Args:
        format: ``float16`` (11 bits of precision; magnitudes above 65,504 become 65,504) or ``bfloat16`` (8 bits of
            precision, range of float32).

    *Guarantees*: numbers are rounded to nearest, ties to even. In the normal range, the relative error is at most
    ``2^-11`` (float16) or ``2^-8`` (bfloat16).

    Reference: IEEE 754-2019, binary16; for bfloat16, Kalamkar et al., *A Study of BFLOAT16 for Deep Learning Training*,
    2019, arXiv:1905.12322.
    """
    require(format in FORMATS, "format", format, f"one of {', '.join(FORMATS)}", "format=float16")

    def encode(vector_D: np.ndarray, layout: Layout, rng: Rng) -> bytes:
        if format == "float16":
            return np.clip(vector_D, -65504, 65504).astype("<f2").tobytes()
        bits_D = vector_D.astype("<f4").view("<u4").astype(np.uint64)
        # without the bound, rounding up the largest number would give infinity
        rounded_D = np.minimum((bits_D + 0x7FFF + ((bits_D >> 16) & 1)) >> 16, (bits_D >> 31 << 15) + 0x7F7F)
        return rounded_D.astype("<u2").tobytes()

    def decode(payload: bytes, layout: Layout, rng: Rng) -> np.ndarray:
        expect(len(payload) == 2 * layout.num_parameters, "numbers")
        if format == "float16":
            return np.frombuffer(payload, "<f2").astype(np.float32)
        return (np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32)

    return _stage(Codec(encode, decode))


def powersgd(*, rank: int = 2, error_feedback: bool = True) -> Stage:
    """Return PowerSGD: send each matrix as a product of two thin matrices, and small tensors uncompressed.

    ``M ~ P Q^T`` with orthonormal ``P`` of ``rank`` columns, after two subspace iterations from a random start. The
    paper starts from ``Q`` of the last round, and one iteration is then enough.

    Args:
        rank: number of columns, >= 1. A tensor is small if its factors would not have fewer numbers.
        error_feedback: whether a client adds its encoding error to its next update.

    Reference: Vogels, Karimireddy, Jaggi, *PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization*, NeurIPS 2019, arXiv:1905.13727, Algorithm 1.
    """
    require(is_count(rank), "rank", rank, "a whole number >= 1", "rank=2")

    def matrix_shape(leaf: Leaf) -> tuple[int, int] | None:
        rows, columns = (leaf.shape or (1,))[0], prod(leaf.shape[1:])
        return (rows, columns) if rank * (rows + columns) < rows * columns else None

    def encode(vector_D: np.ndarray, layout: Layout, rng: Rng) -> bytes:
        parts = []
        for leaf in layout.leaves:
            tensor, shape = vector_D[layout.slices[leaf.name]], matrix_shape(leaf)
            if shape is None:
                parts.append(tensor)
                continue
            matrix, q = tensor.reshape(shape).astype(np.float64), rng.standard_normal((shape[1], rank))
            for _ in range(2):
                p, _ = np.linalg.qr(matrix @ q)
                q = matrix.T @ p
            parts += [p.ravel(), q.ravel()]
        return np.concatenate(parts).astype("<f4").tobytes()

    def decode(payload: bytes, layout: Layout, rng: Rng) -> np.ndarray:
        sizes = [leaf.size if (shape := matrix_shape(leaf)) is None else rank * sum(shape) for leaf in layout.leaves]
        parts = np.split(_floats(payload, sum(sizes)), np.cumsum(sizes)[:-1])
        return np.concatenate(
            [_product(part, matrix_shape(leaf), rank) for part, leaf in zip(parts, layout.leaves, strict=True)]
        )

    return _stage(Codec(encode, decode), error_feedback=error_feedback)


def eden(*, bits: int = 1) -> Stage:
    """Return EDEN: rotate the update at random, so that it looks Gaussian, and quantize to ``2^bits`` levels.

    Random signs, followed by a Hadamard matrix, rotate each block of 4096 numbers (`RandomRotation`). Both sides derive
    the signs from the seed. Two such rotations are used: with one, a test with a single large number showed a bias of
    several deviations. The levels are the Lloyd-Max quantizer of a Gaussian. A scale per block makes the result
    unbiased. With one bit this is DRIVE.

    Args:
        bits: bits per number, in 1..8.

    *Guarantees*: unbiased over uniform rotations, which these rotations approximate. With one bit, the squared error is
    about ``pi / 2 - 1`` times the squared norm.

    References: Vargaftik et al., *DRIVE: One-bit Distributed Mean Estimation*, NeurIPS 2021, arXiv:2105.08339;
    Vargaftik et al., *EDEN: Communication-Efficient and Robust Distributed Mean Estimation for Federated Learning*,
    ICML 2022, arXiv:2108.08842.
    """
    require(is_count(bits) and bits <= 8, "bits", bits, "a whole number in 1..8", "bits=1")

    def encode(vector_D: np.ndarray, layout: Layout, rng: Rng) -> bytes:
        rotation = RandomRotation(len(vector_D), rng)
        padded = np.zeros((rotation.num_blocks, rotation.block_size), np.float32)
        padded.reshape(-1)[: len(vector_D)] = vector_D

        def quantize(first: int) -> tuple[np.ndarray, np.ndarray]:
            return _quantize(rotation.apply(padded[first : first + ROWS_PER_CHUNK], first), bits)

        scales, levels = zip(*map_in_threads(quantize, rotation.chunks()), strict=True)
        return np.concatenate(scales).tobytes() + pack_levels(np.concatenate(levels).reshape(-1), 2**bits)

    def decode(payload: bytes, layout: Layout, rng: Rng) -> np.ndarray:
        rotation = RandomRotation(layout.num_parameters, rng)
        shape = (rotation.num_blocks, rotation.block_size)
        scale_M1 = _floats(payload[: 4 * shape[0]], shape[0])[:, None]
        levels_MB = unpack_levels(payload[4 * shape[0] :], shape[0] * shape[1], 2**bits).reshape(shape)
        centroids, vector_MB = _centroids(bits).astype(np.float32), np.empty(shape, np.float32)

        def invert(first: int) -> None:
            rows = slice(first, first + ROWS_PER_CHUNK)
            vector_MB[rows] = rotation.invert(scale_M1[rows] * centroids[levels_MB[rows]], first)

        deque(map_in_threads(invert, rotation.chunks()), maxlen=0)
        return vector_MB.reshape(-1)[: layout.num_parameters]

    return _stage(Codec(encode, decode))


def _quantize(rotated_MB: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale of each rotated block, float32, and the level of each number, uint8."""
    wide_MB, width = rotated_MB.astype(np.float64), rotated_MB.shape[1]
    norm_M = np.sqrt((wide_MB * wide_MB).sum(axis=1))
    levels_MB = np.zeros(rotated_MB.shape, np.uint8)
    for edge_M1 in np.multiply.outer(_edges(bits), norm_M[:, None] / np.sqrt(width)).astype(np.float32):
        levels_MB += rotated_MB > edge_M1
    products_M = (wide_MB * _centroids(bits)[levels_MB]).sum(axis=1)
    return (norm_M**2 / np.maximum(products_M, 1e-300)).astype("<f4"), levels_MB


def signs() -> Stage:
    """Return signs: send one bit per number, decoded as -1 for numbers below zero, else as +1."""

    def encode(vector_D: np.ndarray, layout: Layout, rng: Rng) -> bytes:
        return np.packbits(vector_D < 0).tobytes()

    def decode(payload: bytes, layout: Layout, rng: Rng) -> np.ndarray:
        size = layout.num_parameters
        expect(len(payload) == -(-size // 8), "signs")
        negative_D = np.unpackbits(np.frombuffer(payload, np.uint8), count=size)
        return 1 - 2 * negative_D.astype(np.float32)

    return _stage(Codec(encode, decode))._replace(is_sign_only=True)


def _stage(codec: Codec, *, error_feedback: bool = False, contracts: bool = False) -> Stage:
    client_half = Transform(init=lambda layout: {"error": zeros(layout)}) if error_feedback else Transform()
    return Stage(client=client_half, codec=codec, is_nonexpansive=contracts)


def _stochastic_rounding(
    levels: int, starts: Callable[[Layout], np.ndarray], scale: Callable[[np.ndarray], float]
) -> Codec:
    """Return a codec that rounds each number at random to a multiple of the step of its part.

    Args:
        levels: number of steps between zero and the scale of a part.
        starts: index of the first number of each part.
        scale: scale of a part.
    """

    def spread(scales_M: np.ndarray, layout: Layout) -> np.ndarray:
        sizes_M = np.diff(np.append(starts(layout), layout.num_parameters))
        return np.repeat(scales_M / np.float32(levels), sizes_M)

    def encode(vector_D: np.ndarray, layout: Layout, rng: Rng) -> bytes:
        parts = np.split(vector_D, starts(layout)[1:])
        scales_M = np.array([scale(part) for part in parts]).astype("<f4")
        step_D = spread(scales_M, layout).astype(np.float64)
        ratio_D = np.abs(vector_D) / np.where(step_D > 0, step_D, 1)
        number_D = np.minimum(np.floor(ratio_D + rng.random(len(vector_D))), levels).astype(np.int64)
        return scales_M.tobytes() + pack_levels(levels + np.where(vector_D < 0, -number_D, number_D), 2 * levels + 1)

    def decode(payload: bytes, layout: Layout, rng: Rng) -> np.ndarray:
        count = len(starts(layout))
        scales_M = _floats(payload[: 4 * count], count)
        levels_D = unpack_levels(payload[4 * count :], layout.num_parameters, 2 * levels + 1)
        return spread(scales_M, layout) * (levels_D.astype(np.float32) - np.float32(levels))

    return Codec(encode, decode)


def _product(part: np.ndarray, shape: tuple[int, int] | None, rank: int) -> np.ndarray:
    if shape is None:
        return part
    p, q = part[: shape[0] * rank].reshape(shape[0], rank), part[shape[0] * rank :].reshape(shape[1], rank)
    product: np.ndarray = (p.astype(np.float64) @ q.T.astype(np.float64)).astype(np.float32).ravel()
    return product


@cache
def _centroids(bits: int) -> np.ndarray:
    """Return the levels of the optimal quantizer of a standard normal number. Each is the mean of its interval.

    >>> np.round(_centroids(1), 4), np.round(_centroids(2), 3)
    (array([-0.7979,  0.7979]), array([-1.51 , -0.453,  0.453,  1.51 ]))

    Reference: Max, *Quantizing for Minimum Distortion*, IRE Transactions on Information Theory 1960, Table I.
    """
    normal = NormalDist()
    levels = np.array([normal.inv_cdf((i + 0.5) / 2**bits) for i in range(2**bits)])
    for _ in range(5000):
        edges = [-np.inf, *(levels[1:] + levels[:-1]) / 2, np.inf]
        density = np.array([0.0, *map(normal.pdf, edges[1:-1]), 0.0])
        below = np.array([0.0, *map(normal.cdf, edges[1:-1]), 1.0])
        previous, levels = levels, -np.diff(density) / np.diff(below)
        if np.abs(levels - previous).max() < 1e-9:
            break
    return (levels - levels[::-1]) / 2


def _edges(bits: int) -> np.ndarray:
    levels = _centroids(bits)
    return (levels[1:] + levels[:-1]) / 2


def _floats(payload: bytes, count: int) -> np.ndarray:
    expect(len(payload) == 4 * count, "numbers")
    return np.frombuffer(payload, "<f4").astype(np.float32)


def _count(share: float, size: int) -> int:
    return max(1, round(share * size))


def _require_share(share: float) -> None:
    is_share = is_number(share, at_least=0) and 0 < share <= 1
    require(is_share, "share", share, "a share in (0, 1]", "share=0.01")
