"""Notice changed and deleted data files, so that a node does not train on data that its operator has removed.

The files of a scenario are all files in the operator's data folder, and all files that its builder opened.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlearn.core.import_path import ROOT

NO_DATA_SUFFIXES = (".py", ".pyc", ".so", ".pyi", ".yaml", ".yml", ".json")
NO_DATA_FOLDERS = ("/proc", "/sys", "/dev", sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"])
Version = tuple[int, int, int]  # time of the last change, size and number of a file
_recorders: list[tuple[int, set[str]]] = []  # thread -> names of opened files


def record_opened_files() -> None:
    """Enable `recorded` for the rest of this process; call this function once."""
    sys.addaudithook(_record)


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _recorders or not isinstance(arguments[0], str | os.PathLike):
        return
    name, flags = os.fspath(arguments[0]), arguments[2]
    is_read = not isinstance(flags, int) or flags & (os.O_WRONLY | os.O_RDWR) == 0
    for thread, names in _recorders:
        if is_read and thread == threading.get_ident() and isinstance(name, str):
            names.add(name)


@contextmanager
def recorded() -> Iterator[set[str]]:
    """Return the names of the files that this thread opens in the block."""
    names: set[str] = set()
    entry = (threading.get_ident(), names)
    _recorders.append(entry)
    try:
        yield names
    finally:
        _recorders.remove(entry)


@dataclass
class DataFiles:
    """The versions of the data files at the time at which they were read.

    Args:
        folder: data folder of the operator; None for none.
    """

    folder: Path | None
    _opened: set[str] = field(default_factory=set)
    _versions: dict[str, Version] = field(default_factory=dict)

    def remember(self, opened: set[str]) -> None:
        """Store the versions of the files in the folder and of the opened files."""
        self._opened |= {os.path.abspath(name) for name in opened if _is_data(name)}
        self._versions = self._read_versions()

    def changes(self) -> list[str]:
        """Return the names of the files that were changed, added or deleted since they were read, without folders."""
        if not self._versions and not self._opened:
            return []
        present = self._read_versions()
        names = {name for name in self._versions.keys() | present if self._versions.get(name) != present.get(name)}
        return sorted(os.path.basename(name) for name in names)

    def digest(self) -> str:
        """Return a digest of names, sizes and times of change of the files in use; empty without files."""
        versions = sorted((os.path.basename(name), *version) for name, version in self._versions.items())
        return hashlib.sha256(repr(versions).encode()).hexdigest() if versions else ""

    def forget(self) -> None:
        """Forget all files, because no data are in memory."""
        self._opened, self._versions = set(), {}

    def _read_versions(self) -> dict[str, Version]:
        names = set(self._opened)
        if self.folder is not None:
            for folder, _, files in os.walk(self.folder):
                names |= {os.path.join(folder, file) for file in files}
        return {name: version for name in names if (version := _version(name)) is not None}


def _version(name: str) -> Version | None:
    try:
        status = os.stat(name)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _is_data(name: str) -> bool:
    path = os.path.abspath(name)
    in_library = path.startswith(NO_DATA_FOLDERS) or path.startswith(str(ROOT / "conf"))
    return not in_library and not path.endswith(NO_DATA_SUFFIXES)
