"""Read a file that may be compressed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from fedlearn.advice import command
from fedlearn.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"  # first bytes of a gzip file


@contextmanager
def open_decompressed(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; decompress a gzip file, which is recognized by its first bytes.

    Raises:
        DataError: the file does not exist, cannot be read, or is a damaged gzip file.
    """
    try:
        with file.open("rb") as raw:
            packed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            raw.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fix = command("mv", file, f"{file}.damaged")
        problem = f"{file.name} is a damaged gzip file: {error}"
        expected = "a complete file; a missing file is downloaded again"
        raise DataError(f"{problem}\n  expected  {expected}\n  try       {fix}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
