"""Search for the files of a data set, nearest place first. An error names each place and its reason."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from fedlearn.advice import label
from fedlearn.data.download import fetch as fetching
from fedlearn.data.download.catalog import (
    Archive,
    DataSet,
    LocalCopy,
    LocatedFiles,
    NpmPackage,
    OfficialSource,
    Origin,
    Wheel,
    cache_folder,
    file_problem,
)
from fedlearn.errors import DataError

LOCK_S = 600.0  # seconds to wait for another process that downloads the same data


def find(data: DataSet, *, path: str | os.PathLike[str] | None = None, base_url: str | None = None) -> LocatedFiles:
    """Return the verified files of a data set.

    With ``path``, only this place is searched. Without it, the order is: the cache, ``FEDLEARN_DATA``, an installed
    package, the pinned packages, the official source. ``FEDLEARN_DATA`` is the folder itself, or has a subfolder with
    the name of the data set.

    Args:
        data: description of the data set.
        path: a folder with the files of one origin, or one of those files.
        base_url: address of a mirror. None takes the subfolder of ``FEDLEARN_MIRROR`` with the name of the data set, or
            the official address.

    Raises:
        DataError: no place has the files. The message names each place and its reason.

    *Guarantees*: a file is used only if its checksum is right. If several processes need it, one of them downloads.
    """
    tried: list[str] = []
    if located := _find_here(data, path, tried):
        return located
    if path is not None:
        return _refuse(data, tried, "path=<a folder with the files named above>, or leave path out")
    return _download(data, base_url, tried) or _refuse(data, tried, _advice(data))


def find_local(data: DataSet, *, path: str | os.PathLike[str] | None = None) -> LocatedFiles | None:
    """Return the verified files of a data set if they are on this machine; download nothing."""
    return _find_here(data, path, [])


def _find_here(data: DataSet, path: str | os.PathLike[str] | None, tried: list[str]) -> LocatedFiles | None:
    if path is not None:
        chosen = Path(path).expanduser()
        return _in_folder(data, chosen.parent if chosen.is_file() else chosen, "path", tried)
    cache = cache_folder() / data.name
    return _in_folder(data, cache, "cache", tried) or _in_data_folder(data, tried) or _in_installed_package(data, tried)


def _in_folder(data: DataSet, folder: Path, place: str, tried: list[str]) -> LocatedFiles | None:
    if not folder.is_dir():
        tried.append(f"{place} {folder}: no such folder")
        return None
    for origin in data.origins:
        files = {name: folder / name for name in origin.files}
        if not (problem := _first_problem(files, origin)):
            source = f"of {origin}" if place == "cache" else str(folder)
            return LocatedFiles(origin=origin, files=files, place=f"{place} {source}")
        if isinstance(origin, Archive) and (folder / origin.name).is_file():
            if unpacked := _unpacked(data, origin, folder / origin.name, tried):
                return LocatedFiles(origin=origin, files=unpacked, place=f"{place} {folder / origin.name}")
        else:
            tried.append(f"{place} {folder}: {problem}")
    return None


def _unpacked(data: DataSet, origin: Archive, archive: Path, tried: list[str]) -> Mapping[str, Path]:
    """Unpack a local archive into the cache; return its files, or nothing if that fails."""
    cache = cache_folder() / data.name
    files = {name: cache / name for name in origin.files}
    try:
        if problem := file_problem(archive, origin.checksum):
            raise fetching.PermanentFetchError(problem)
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache):
            if _first_problem(files, origin):
                fetching.unpack_archive(origin, archive, cache)
        return files
    except (fetching.FetchError, Timeout, OSError) as error:
        tried.append(f"{archive}: {error}")
        return {}


def _first_problem(files: Mapping[str, Path], origin: Origin) -> str | None:
    return next((problem for name, file in files.items() if (problem := file_problem(file, origin.files[name]))), None)


def _in_data_folder(data: DataSet, tried: list[str]) -> LocatedFiles | None:
    chosen = os.environ.get("FEDLEARN_DATA")
    if not chosen:
        tried.append("FEDLEARN_DATA: not set")
        return None
    folder = Path(chosen).expanduser()
    subfolder = folder / data.name
    return _in_folder(data, subfolder if subfolder.is_dir() else folder, "FEDLEARN_DATA", tried)


def _in_installed_package(data: DataSet, tried: list[str]) -> LocatedFiles | None:
    for wheel in (origin for origin in data.origins if isinstance(origin, Wheel)):
        try:
            package = importlib.metadata.distribution(wheel.name)
        except importlib.metadata.PackageNotFoundError:
            tried.append(f"installed package {wheel.name}: not installed")
            continue
        files = {Path(member).name: Path(str(package.locate_file(member))) for member in wheel.members}
        if not (problem := _first_problem(files, wheel)):
            return LocatedFiles(origin=wheel, files=files, place=f"installed package {wheel.name}")
        tried.append(f"installed package {wheel.name}: {problem}")
    return next((located for origin in data.origins if (located := _in_system_folder(origin, tried))), None)


def _in_system_folder(origin: Origin, tried: list[str]) -> LocatedFiles | None:
    if not (isinstance(origin, LocalCopy) and origin.folder):
        return None
    files = {name: Path(origin.folder) / name for name in origin.files}
    if not (problem := _first_problem(files, origin)):
        return LocatedFiles(origin=origin, files=files, place=origin.folder)
    tried.append(f"folder {origin.folder}: {problem}")
    return None


def _download(data: DataSet, base_url: str | None, tried: list[str]) -> LocatedFiles | None:
    cache, mirror = cache_folder() / data.name, os.environ.get("FEDLEARN_MIRROR")
    base_url = base_url or (f"{mirror.rstrip('/')}/{data.name}" if mirror else None)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache):
            # another process may have downloaded them during the wait
            return _in_folder(data, cache, "cache", []) or _fetch_first(data, cache, base_url, tried)
    except Timeout:
        tried.append(f"cache {cache}: another process has held its lock for {LOCK_S:g} s")
    except OSError as error:
        tried.append(f"cache {cache}: cannot be written ({error.strerror})")
    return None


def _lock(cache: Path) -> FileLock:
    return FileLock(cache / ".lock", timeout=LOCK_S, is_singleton=True)  # reentrant within this process


def _fetch_first(data: DataSet, cache: Path, base_url: str | None, tried: list[str]) -> LocatedFiles | None:
    for origin in data.origins:
        if isinstance(origin, LocalCopy):
            continue
        is_package = isinstance(origin, Wheel | NpmPackage)
        kind = "wheel" if isinstance(origin, Wheel) else "package" if is_package else "download"
        source = origin if is_package else base_url or origin
        if isinstance(origin, OfficialSource) and not (base_url or origin.base_url):
            tried.append("download: no server has it in this form")
            continue
        try:
            fetching.fetch(origin, cache, base_url=base_url, max_bytes=data.max_bytes)
        except fetching.FetchError as error:
            tried.append(f"{kind} {source}: {error}")
            continue
        files = {name: cache / name for name in origin.files}
        return LocatedFiles(origin=origin, files=files, place=f"{kind} {source}")
    return None


def _advice(data: DataSet) -> str:
    names = ([origin.name] if isinstance(origin, Archive) else [*origin.files] for origin in data.origins)
    wanted = " or ".join(", ".join(files) for files in names)
    return f"put {wanted} into a folder and set path=<this folder>"


def _refuse(data: DataSet, tried: list[str], fix: str) -> LocatedFiles:
    lines = [f"{data.name} cannot be found", *(f"  tried     {reason}" for reason in tried), label(fix)]
    raise DataError("\n".join(lines))
