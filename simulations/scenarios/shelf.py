"""Files that nobody offers for download in the form they are needed in: they lie somewhere, or are not to be had."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from fedlearn.data.sources.origins import cache_folder, fault
from fedlearn.errors import DataError


def shelved(
    name: str, files: Mapping[str, str], *, path: str | PathLike[str] | None, advice: str
) -> tuple[dict[str, Path], str]:
    """The verified files of a data set, and where they were found.

    Args:
        name: of the data set, and of its folder.
        files: file name -> checksum, e.g. ``sha256:...``.
        path: a folder with the files, or one of them; None looks into the cache and ``FEDLEARN_DATA``.
        advice: how else to get hold of the data.

    Raises:
        DataError: names each place tried and why it failed.
    """
    tried = []
    for place, folder in _places(name, path):
        there = {file: folder / file for file in files}
        faults = [why for file, at in there.items() if (why := fault(at, files[file]))]
        if not faults:
            return there, f"{place} {folder}"
        tried.append(f"  tried     {place} {folder}: {faults[0]}")
    if path is None and "FEDLEARN_DATA" not in os.environ:
        tried.append("  tried     FEDLEARN_DATA: not set")
    raise DataError("\n".join([f"{name} cannot be found", *tried, f"  try       {advice}"]))


def _places(name: str, path: str | PathLike[str] | None) -> list[tuple[str, Path]]:
    if path is not None:
        given = Path(path).expanduser()
        return [("path", given.parent if given.is_file() else given)]
    places = [("cache", cache_folder() / name)]
    chosen = os.environ.get("FEDLEARN_DATA")
    if chosen:
        below = Path(chosen).expanduser() / name
        places.append(("FEDLEARN_DATA", below if below.is_dir() else below.parent))
    return places
