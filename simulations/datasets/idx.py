"""Read IDX, the file format of MNIST and of similar data sets.

Reference: LeCun, Cortes, Burges, *The MNIST database of handwritten digits*, 1998.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from fedlearn.errors import DataError

FIX = "\n  expected  an IDX file, gzipped or plain\n  advice    another copy of the file"
BYTES = 8  # code of unsigned bytes, the only type in these data sets


def read_idx(file: Path) -> np.ndarray:
    """Read an array of uint8 from an IDX file, gzipped if its name ends with ``.gz``.

    The file starts with two zero bytes, the code of the type and the number of dimensions. Each dimension follows as a
    big-endian 32-bit number, then the values.

    Raises:
        DataError: The file has another format, or is truncated.
    """
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise DataError(f"{file} is not a complete gzip file: {error}{FIX}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != BYTES or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{file} is not an IDX file of bytes: it starts with {content[:4].hex(' ')}{FIX}")
    num_dimensions = content[3]
    shape = tuple(np.frombuffer(content, ">u4", num_dimensions, offset=4).tolist())
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions)
    if len(values) != np.prod(shape):
        raise DataError(f"{file} has {len(values)} values, but its shape is {' x '.join(map(str, shape))}{FIX}")
    return values.reshape(shape)
