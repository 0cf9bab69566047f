"""Read members of untrusted zip and tar archives.

`unpack` writes only the requested names. The extractor of pooch 1.9.0 does not replace it: on Python 3.11 it extracts a
tar member named ``../../outside.txt`` to that path.
"""

from __future__ import annotations

import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from fedlearn.data.download.catalog import file_problem
from fedlearn.data.download.http import FetchError, PermanentFetchError

ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError)


def unpack(archive: Path, members: Mapping[str, str | None], folder: Path) -> None:
    """Copy members into a folder, each under the last part of its path.

    Args:
        archive: zip or tar (plain, gz, bz2, xz).
        members: path in the archive -> checksum, None for no check.
        folder: destination; the caller deletes it after an error.

    *Guarantees*: only the requested members are written, each under its own name. An archive with a member path outside
    of it is refused.

    Raises:
        FetchError: the archive is damaged.
        PermanentFetchError: a member is missing, is not a regular file, has a path outside, or another checksum.
    """
    missing = dict(members)
    try:
        with closing(_entries(archive)) as entries:
            for name, content_of in entries:
                _refuse_outside(archive, name)
                if name in missing:
                    _copy(content_of(), folder / PurePosixPath(name).name, missing.pop(name))
    except ARCHIVE_ERRORS as error:
        raise FetchError(f"{archive.name} is a damaged archive: {error}") from error
    if missing:
        raise PermanentFetchError(f"{archive.name} has no member {', '.join(missing)}")


def _entries(archive: Path) -> Generator[tuple[str, Callable[[], IO[bytes] | None]], None, None]:
    """Yield the name of each member and a function to open it, which returns None for links and folders."""
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for entry in tar:
                yield entry.name.removeprefix("./"), partial(_open_member, tar, entry)
    else:
        with zipfile.ZipFile(archive) as packed:
            for name in packed.namelist():
                _refuse_outside(archive, name)
            for name in packed.namelist():
                yield name, partial(packed.open, name)


def _open_member(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes] | None:
    return tar.extractfile(entry) if entry.isreg() else None


def _refuse_outside(archive: Path, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    has_drive = bool(path.parts) and path.parts[0].endswith(":")
    if path.is_absolute() or ".." in path.parts or has_drive:
        raise PermanentFetchError(f"{archive.name} is refused: its member {name!r} has a path outside the archive")


def _copy(content: IO[bytes] | None, target: Path, checksum: str | None) -> None:
    if content is None:
        raise PermanentFetchError(f"{target.name} is not a regular file in its archive")
    with content, target.open("wb") as file:
        shutil.copyfileobj(content, file)
    if checksum and (problem := file_problem(target, checksum)):
        raise PermanentFetchError(problem)
