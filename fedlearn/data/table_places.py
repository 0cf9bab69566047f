"""Infer the client and the split of each table from the names of folders and files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fedlearn.data.folder_layout import ANY, CLIENT, SPLIT
from fedlearn.data.split_names import TRAIN, are_splits, split_of
from fedlearn.data.tables import table_stem
from fedlearn.errors import DataError, SettingError

Place = tuple[str, str | None]  # client, empty if the path names none; and split
_LAST = re.compile(r"(?P<client>.+?)[-_. ]+(?P<split>[^-_. ]+)")
_FIRST = re.compile(r"(?P<split>[^-_. ]+)[-_. ]+(?P<client>.+)")


def table_places(path: Path, files: Sequence[Path], *, layout: str | None = None) -> list[Place]:
    """Return the client and the split of each table.

    Args:
        path: the folder.
        files: tables below it.
        layout: meaning of each folder and of the name of the file, e.g. ``client/split``; None infers it.

    Raises:
        DataError: a file is too deep in the folder to name its client.
        SettingError: the stated layout does not fit the files.
    """
    levels = [(*file.relative_to(path).parts[:-1], table_stem(file)) for file in files]
    if layout is not None:
        return _stated_places(levels, layout)
    if all(len(names) > 2 for names in levels) and len({names[0] for names in levels}) == 1:
        levels = [names[1:] for names in levels]  # a folder around all others
    for file, names in zip(files, levels, strict=True):
        if len(names) > 2:
            fix = "north.csv or north/train.csv, for a client with the name north"
            raise DataError(f"{file.relative_to(path)} is too deep in the folder to name its client\n  advice    {fix}")
    if len(levels) == 1 and len(levels[0]) == 1:  # nothing to train on beside a single split
        return [("" if split_of(levels[0][0]) else levels[0][0], None)]
    if all(len(names) == 1 for names in levels) and (places := _places_in_stems([names[0] for names in levels])):
        return places
    is_by_split = are_splits(names[0] if len(names) == 2 else "" for names in levels)
    return [_place(names, is_by_split=is_by_split) for names in levels]


def _place(names: tuple[str, ...], *, is_by_split: bool) -> Place:
    *folders, stem = names
    split = split_of(stem)
    if is_by_split:  # train/north.csv, or train/train.csv
        return ("" if split else stem), split_of(folders[0])
    return (folders[0] if folders else "" if split else stem), split


def _places_in_stems(stems: Sequence[str]) -> list[Place] | None:
    """Return the places of files such as ``north_train`` or ``train_north``; None for other names."""
    for pattern in (_LAST, _FIRST):
        found = [pattern.fullmatch(stem) for stem in stems]
        places = [(match["client"], split_of(match["split"])) for match in found if match]
        if len(places) == len(stems) and all(split for _, split in places) and TRAIN in {split for _, split in places}:
            return [*places]
    return None


def _stated_places(levels: Sequence[tuple[str, ...]], layout: str) -> list[Place]:
    meanings = [level.strip() for level in str(layout).strip("/").split("/")]
    is_known = all(meaning in (CLIENT, SPLIT, ANY) for meaning in meanings)
    if not is_known or any(len(names) != len(meanings) for names in levels):
        depth = len(max(levels, key=len))
        expected = f"client, split or * for each folder and for the name of the file, here {depth} levels"
        raise SettingError("layout", layout, expected, f"layout={'/'.join([CLIENT, SPLIT, ANY][:depth])}")

    def name_at(meaning: str) -> Callable[[tuple[str, ...]], str]:
        return lambda names: names[meanings.index(meaning)] if meaning in meanings else ""

    client, split = name_at(CLIENT), name_at(SPLIT)
    return [(client(names), split_of(split(names)) if SPLIT in meanings else None) for names in levels]
