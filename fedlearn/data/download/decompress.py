"""Reading a file that may be compressed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from fedlearn.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"  # how such a file begins


@contextmanager
def open_decompressed(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, uncompressed if it is a gzip file, whatever it is called.

    Raises:
        DataError: it is not there, cannot be read, or is a gzip file that is cut off or damaged.
    """
    try:
        with file.open("rb") as raw:
            packed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            raw.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fix = f"remove {file}, so that it is brought again"
        raise DataError(f"{file.name} is a damaged gzip file: {error}\n  try       {fix}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
