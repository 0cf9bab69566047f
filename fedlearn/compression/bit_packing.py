"""Encode numbers in few bytes: as packed bits, as gaps between indices in Rice code, or with deflate.

Shapes: N numbers.

Decoders take the expected number of values. They raise `ValueError` for any other content, because the bytes come from
an untrusted sender.
"""

from __future__ import annotations

import zlib
from math import log, log2

import numpy as np


def pack_bits(numbers_N: np.ndarray, width: int) -> bytes:
    """Pack the ``width`` lowest bits of each number, without gaps.

    Args:
        numbers_N: integers >= 0.
        width: bits per number, >= 1.

    >>> len(pack_bits(np.arange(8), 3)), unpack_bits(pack_bits(np.arange(8), 3), 8, 3).tolist()
    (3, [0, 1, 2, 3, 4, 5, 6, 7])
    """
    bits_NW = np.empty((len(numbers_N), width), np.uint8)
    for bit in range(width):
        bits_NW[:, bit] = (numbers_N >> bit) & 1
    return np.packbits(bits_NW).tobytes()


def unpack_bits(payload: bytes, count: int, width: int, dtype: type = np.int64) -> np.ndarray:
    """Return the ``count`` numbers that `pack_bits` packed.

    Args:
        payload: bytes of an untrusted sender.
        count: number of numbers.
        width: bits per number, >= 1.
        dtype: integer type of the result, with at least ``width`` bits; default int64.

    Raises:
        ValueError: the payload has another length.
    """
    require_valid(len(payload) == -(-count * width // 8), "bits")
    bits_NW = np.unpackbits(np.frombuffer(payload, np.uint8), count=count * width).reshape(count, width)
    numbers_N: np.ndarray = np.zeros(count, dtype)
    for bit in range(width):
        numbers_N |= bits_NW[:, bit].astype(dtype) << bit
    return numbers_N


def pack_levels(levels_N: np.ndarray, base: int) -> bytes:
    """Pack numbers in ``[0, base)`` by the shortest of three encodings: bits, digits of a byte, or deflated digits.

    The first byte names the encoding.

    Args:
        levels_N: integers in ``[0, base)``.
        base: number of levels, at most 256.

    >>> ternary = np.array([0, 1, 2, 1, 0] * 200)
    >>> bool((unpack_levels(pack_levels(ternary, 3), 1000, 3) == ternary).all()), len(pack_levels(ternary, 3)) < 200
    (True, True)
    """
    raw_N, per_byte = np.asarray(levels_N).astype(np.uint8), _digits_per_byte(base)
    digits_MW = np.concatenate([raw_N, np.zeros(-len(raw_N) % per_byte, np.uint8)]).reshape(-1, per_byte)
    bytes_M = digits_MW[:, -1].copy()
    for digit in reversed(range(per_byte - 1)):
        bytes_M *= np.uint8(base)  # a byte has one digit only if the base is 256
        bytes_M += digits_MW[:, digit]
    digits = bytes_M.tobytes()
    encodings = (pack_bits(raw_N, _width(base)), digits, _deflate(digits))
    shortest = min(range(3), key=lambda i: len(encodings[i]))
    return bytes([shortest]) + encodings[shortest]


def unpack_levels(payload: bytes, count: int, base: int) -> np.ndarray:
    """Return the ``count`` numbers that `pack_levels` packed, uint8, each below ``base``.

    Raises:
        ValueError: the payload is damaged, or has another number of values.
    """
    require_valid(len(payload) > 0 and payload[0] < 3, "levels")
    encoding, rest, per_byte = payload[0], payload[1:], _digits_per_byte(base)
    if encoding == 0:
        levels_N = unpack_bits(rest, count, _width(base), np.uint8)
    elif encoding == 1:
        levels_N = _unpack_digits(rest, count, base)
    else:
        levels_N = _unpack_digits(inflate(rest, -(-count // per_byte)), count, base)
    require_valid(bool((levels_N < base).all()), "levels")
    return levels_N


def _unpack_digits(payload: bytes, count: int, base: int) -> np.ndarray:
    per_byte = _digits_per_byte(base)
    require_valid(len(payload) == -(-count // per_byte), "digits")
    rest_M = np.frombuffer(payload, np.uint8)
    digits_MW = np.empty((len(rest_M), per_byte), np.uint8)
    for digit in range(per_byte):
        quotient_M = rest_M // base if base < 256 else np.zeros_like(rest_M)
        digits_MW[:, digit] = rest_M - quotient_M * np.uint8(base % 256)
        rest_M = quotient_M
    return digits_MW.reshape(-1)[:count]


def _deflate(payload: bytes) -> bytes:
    """Compress by byte frequencies only. Noise has no patterns, and a search for them takes a hundred times longer."""
    writer = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    return writer.compress(payload) + writer.flush()


def inflate(payload: bytes, size: int) -> bytes:
    """Return the decompressed bytes, which must have exactly ``size`` bytes. Memory is limited to this size.

    Raises:
        ValueError: the payload is damaged, or has another size.
    """
    reader = zlib.decompressobj()
    try:
        content = reader.decompress(payload, size + 1)
    except zlib.error as error:
        raise ValueError(f"deflated bytes are damaged: {error}") from error
    require_valid(len(content) == size and reader.eof, "deflated bytes")
    return content


def pack_indices(indices_N: np.ndarray, size: int) -> bytes:
    """Pack ascending indices as gaps in Rice code, about ``log2(size / N) + 1.5`` bits per index.

    Args:
        indices_N: ascending indices in ``[0, size)``.
        size: upper bound of the indices.

    >>> some = np.array([3, 4, 90, 700])
    >>> unpack_indices(pack_indices(some, 1000), 4, 1000).tolist()
    [3, 4, 90, 700]

    Reference: Rice, Plaunt, *Adaptive Variable-Length Coding for Efficient Compression of Spacecraft Television Data*,
    IEEE Transactions on Communication Technology 1971.
    """
    gaps_N = np.diff(indices_N, prepend=-1) - 1
    low = _low_bits(len(indices_N), size)
    ends_N = np.cumsum((gaps_N >> low) + 1)
    unary = np.zeros(int(ends_N[-1]) if len(ends_N) else 0, np.uint8)
    unary[ends_N - 1] = 1
    return pack_bits(gaps_N, low) + np.packbits(unary).tobytes()


def unpack_indices(payload: bytes, count: int, size: int) -> np.ndarray:
    """Return the ``count`` indices that `pack_indices` packed, int64, ascending and below ``size``.

    Raises:
        ValueError: the payload is damaged, or has another number of indices.
    """
    low = _low_bits(count, size)
    cut = -(-count * low // 8)
    require_valid(len(payload) >= cut and count <= size, "indices")
    ends_N = np.flatnonzero(np.unpackbits(np.frombuffer(payload[cut:], np.uint8)))
    require_valid(len(ends_N) == count, "indices")
    gaps_N = (np.diff(ends_N, prepend=-1) - 1 << low) + unpack_bits(payload[:cut], count, low)
    indices_N = np.cumsum(gaps_N + 1) - 1
    require_valid(not count or int(indices_N[-1]) < size, "indices")
    return indices_N


def require_valid(condition: bool, content: str) -> None:
    """Raise a `ValueError` unless ``condition``.

    Args:
        condition: True if the content is valid.
        content: name of the content, for the message.
    """
    if not condition:
        raise ValueError(f"the {content} in the payload do not fit the layout of the update")


def _low_bits(count: int, size: int) -> int:
    return max(0, int(log2(max(1.0, size / max(1, count) * log(2)))))


def _width(base: int) -> int:
    return max(1, (base - 1).bit_length())


def _digits_per_byte(base: int) -> int:
    """Return the number of digits of this base that fit into one byte."""
    return next(count for count in range(8, 0, -1) if base**count <= 256)
