"""Notice changed and deleted data files, so that a node does not train on data that its operator has removed.

The files of a scenario are all files in the operator's data folder, and all files that its builder opened. A file is
read again after a change of its size, number or times. No program can set the time of the last change of its status.
Then the contents decide whether the data have changed.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlearn.core.import_path import ROOT

NO_DATA_SUFFIXES = (".py", ".pyc", ".so", ".pyi", ".yaml", ".yml", ".json")
NO_DATA_FOLDERS = ("/proc", "/sys", "/dev", sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"])
MAX_CONTENT_BYTES = 16 * 2**30  # size of all files, above which their contents are not read for a digest
Version = tuple[int, int, int, int]  # times of change of contents and status, size and number of a file
_recorders: list[tuple[int, dict[str, Version | None]]] = []  # thread -> opened files


def record_opened_files() -> None:
    """Enable `recorded` for the rest of this process; call this function once."""
    sys.addaudithook(_record)


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _recorders or not isinstance(arguments[0], str | os.PathLike):
        return
    name, flags = os.fspath(arguments[0]), arguments[2]
    is_read = not isinstance(flags, int) or flags & (os.O_WRONLY | os.O_RDWR) == 0
    for thread, opened in _recorders:
        if is_read and thread == threading.get_ident() and isinstance(name, str):
            path = os.path.abspath(name)
            opened.setdefault(path, _version(path))


@contextmanager
def recorded() -> Iterator[dict[str, Version | None]]:
    """Return the files that this thread opens in the block, each with its version at that time."""
    opened: dict[str, Version | None] = {}
    entry = (threading.get_ident(), opened)
    _recorders.append(entry)
    try:
        yield opened
    finally:
        _recorders.remove(entry)


@dataclass
class DataFiles:
    """The versions and contents of the data files at the time at which they were read.

    Args:
        folder: data folder of the operator; None for none.
        max_bytes: size of all files, above which `digest` uses their versions instead of their contents.

    Guarantees:
        `changes` names a file if its contents, its name or its presence has changed. Without contents, it also names a
        file whose times have changed. An edit while the data are read counts as a change.
    """

    folder: Path | None
    max_bytes: int = MAX_CONTENT_BYTES
    _opened: set[str] = field(default_factory=set)
    _versions: dict[str, Version] = field(default_factory=dict)
    _contents: dict[str, tuple[Version, bytes]] = field(default_factory=dict)  # digests, each for a version

    def versions(self) -> dict[str, Version]:
        """Return the present versions of all known files; read them before the data are read."""
        return self._read_versions(self._opened)

    def remember(self, before: Mapping[str, Version], opened: Mapping[str, Version | None]) -> None:
        """Store the versions of the files of which data are in memory. The oldest version of a file counts.

        Args:
            before: result of `versions` before the data were read.
            opened: files that were opened meanwhile, see `recorded`.
        """
        read = {name: version for name, version in opened.items() if _is_data(name)}
        self._opened |= read.keys()
        known = {name: version for name, version in read.items() if version is not None}
        self._versions = {**known, **before, **self._versions}
        self._read_contents()

    def changes(self) -> list[str]:
        """Return the names of the files that were changed, added or deleted since they were read, without folders."""
        if not self._versions and not self._opened:
            return []
        present = self._read_versions(self._opened)
        names = {name for name in self._versions.keys() | present if self._versions.get(name) != present.get(name)}
        return sorted(os.path.basename(name) for name in names if not self._has_equal_contents(name, present.get(name)))

    def digest(self) -> str:
        """Return a digest of the files in use; empty without files.

        Returns:
            ``contents:`` and a digest of names and contents. Above ``max_bytes``: ``versions:`` and a digest of names,
            sizes and times of change.
        """
        if not self._versions:
            return ""
        has_contents = self._contents.keys() == self._versions.keys()
        kind, parts = ("contents", self._contents) if has_contents else ("versions", self._versions)
        listed = sorted(
            (os.path.basename(name), repr(part[1] if has_contents else part)) for name, part in parts.items()
        )
        return f"{kind}:{hashlib.blake2b(repr(listed).encode(), digest_size=32).hexdigest()}"

    def forget(self) -> None:
        """Forget all files, because no data are in memory."""
        self._opened, self._versions = set(), {}

    def _read_contents(self) -> None:
        """Read the contents of the files whose version is new; without a digest of each file, there is none of all."""
        cached = {name: self._contents[name] for name in self._versions.keys() & self._contents}
        self._contents = {}
        if sum(version[2] for version in self._versions.values()) > self.max_bytes:
            return
        for name, version in self._versions.items():
            if (known := cached.get(name)) is not None and known[0] == version:
                self._contents[name] = known
            elif (digest := _content_digest(name, version)) is not None:
                self._contents[name] = (version, digest)

    def _has_equal_contents(self, name: str, present: Version | None) -> bool:
        """Return whether a file with another version has the remembered contents, and remember its new version."""
        known = self._contents.get(name)
        if known is None or present is None or present[2] != known[0][2] or _content_digest(name, present) != known[1]:
            return False
        self._versions[name], self._contents[name] = present, (present, known[1])
        return True

    def _read_versions(self, opened: set[str]) -> dict[str, Version]:
        names = set(opened)
        if self.folder is not None:
            for folder, _, files in os.walk(self.folder):
                names |= {os.path.join(folder, file) for file in files}
        return {name: version for name in names if (version := _version(name)) is not None}


def _version(name: str) -> Version | None:
    try:
        status = os.stat(name)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _content_digest(name: str, version: Version) -> bytes | None:
    """Return a digest of a regular file; None for others, and for a file that no longer has this version."""
    try:
        with open(os.open(name, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a named pipe would block
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).digest()
    except OSError:
        return None
    return digest if _version(name) == version else None


def _is_data(name: str) -> bool:
    path = os.path.abspath(name)
    in_library = path.startswith(NO_DATA_FOLDERS) or path.startswith(str(ROOT / "conf"))
    return not in_library and not path.endswith(NO_DATA_SUFFIXES)
