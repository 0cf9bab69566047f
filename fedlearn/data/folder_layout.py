"""Infer which level of a folder names the split, the client, the class and the group of an image.

Layouts: ``class``, ``client/class``, ``split/class``, ``client/split/class`` and other orders. A folder around all
others, such as ``dataset``, has no meaning.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlearn.data.split_names import are_splits, split_of
from fedlearn.errors import DataError, SettingError

CLIENT, CLASS, SPLIT, GROUP, ANY = "client", "class", "split", "group", "*"
LEVELS = (CLIENT, CLASS, SPLIT, GROUP, ANY)
WRAPPERS = frozenset(
    ("data", "dataset", "datasets", "image", "images", "img", "imgs", "pictures", "photos", "raw", "files", "archive")
)
SYSTEM_NAMES = frozenset(
    ("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
)


@dataclass(frozen=True, kw_only=True)
class FolderLayout:
    """Hold the meaning of each folder level, from the outermost.

    Args:
        levels: ``client``, ``class``, ``split``, ``group`` or ``*`` for each level.

    >>> FolderLayout(levels=("split", "class")).names(("train", "cat"), "split")
    'train'
    """

    levels: tuple[str, ...]

    def __str__(self) -> str:
        return "/".join(self.levels)

    def __contains__(self, level: str) -> bool:
        return level in self.levels

    def names(self, folders: Sequence[str], level: str) -> str:
        """Return the folder of this level among the folders of a file."""
        return folders[self.levels.index(level)]


def list_files(path: Path) -> list[Path]:
    """Return the files below a folder in order of their paths, without hidden files and files of the system.

    Links to folders are followed, each folder once.
    """
    return sorted(_walk(path, set()))


def is_system_file(name: str) -> bool:
    """Return whether a file or folder is hidden, or belongs to the operating system."""
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_NAMES


def _walk(path: Path, parents: set[str]) -> Iterator[Path]:
    real = os.path.realpath(path)
    if real in parents:  # a link to a folder around it
        return
    for entry in path.iterdir():
        if is_system_file(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(entry, parents | {real})
        else:
            yield entry


def infer_layout(
    folders: Sequence[tuple[str, ...]],
    *,
    clients: Collection[str] = (),
    classes: Collection[str] = (),
    layout: str | None = None,
    path: str = "data",
) -> FolderLayout:
    """Return the layout of some files.

    Args:
        folders: folders of each file, from the outermost.
        clients: names of all clients, if they are known.
        classes: names of all classes, if they are known.
        layout: levels as the user states them, e.g. ``client/class``; None infers them.
        path: name of the folder, for messages.

    Raises:
        DataError: the files are at different depths, or the folders have no clear meaning.
        SettingError: the stated layout does not fit the folders.

    >>> str(infer_layout([("data", "TRAIN", "cat"), ("data", "test_set", "cat")]))
    '*/split/class'
    """
    depths = sorted({len(parts) for parts in folders})
    if layout is not None:
        return _stated_layout(layout, depths)
    if len(depths) > 1:
        raise DataError(_different_depths(folders, path))
    names = [list(dict.fromkeys(parts[level] for parts in folders)) for level in range(depths[0])]
    levels = _infer_levels(names, clients, classes)
    if CLASS not in levels or None in levels:
        if not names:
            fix = "a CSV file in this folder, with a column of file names and a column of classes"
            problem = f"{path} has images without folders, and no table with their classes"
            raise DataError(f"{problem}\n  expected  a folder for each class, or a table\n  advice    {fix}")
        shown = "/".join((*folders[0], "1.png"))
        raise DataError(
            f"{path} has images such as {shown}: the meaning of the folders is not clear\n"
            "  expected  folders such as client/class or split/class\n"
            f"  try       scenario.layout={'/'.join(_suggestion(len(names)))}"
        )
    result = FolderLayout(levels=tuple(level or ANY for level in levels))
    _refuse_partial_splits(result, names, path)
    return result


def label_layout(
    folders: Sequence[tuple[str, ...]], *, clients: Collection[str] = (), layout: str | None = None
) -> FolderLayout | None:
    """Return the layout of images whose classes are in a table; None if the folders have no meaning.

    Args:
        folders: folders of each file, from the outermost.
        clients: names of all clients, if they are known.
        layout: levels as the user states them; None infers splits and known clients.

    Raises:
        SettingError: the stated layout does not fit the folders.

    >>> str(label_layout([("images", "train"), ("images", "test")]))
    '*/split'
    """
    depths = sorted({len(parts) for parts in folders})
    if layout is not None:
        return _stated_layout(layout, depths)
    if len(depths) > 1:
        return None
    names = [{parts[level] for parts in folders} for level in range(depths[0])]
    levels = [CLIENT if _all_known([*found], clients) else SPLIT if are_splits(found) else ANY for found in names]
    if any(levels.count(meaning) > 1 for meaning in (CLIENT, SPLIT)) or set(levels) <= {ANY}:
        return None
    return FolderLayout(levels=tuple(levels))


def _infer_levels(
    names: Sequence[Sequence[str]], clients: Collection[str], classes: Collection[str]
) -> list[str | None]:
    """Return the meaning of each level; None for a level without a clear meaning."""
    levels: list[str | None] = [None] * len(names)
    for meaning, known in ((CLIENT, clients), (CLASS, classes)):
        fitting = [level for level, found in enumerate(names) if _all_known(found, known) and levels[level] is None]
        if len(fitting) == 1:
            levels[fitting[0]] = meaning
    splits = [level for level, found in enumerate(names) if levels[level] is None and are_splits(found)]
    if len(splits) == 1 and len(names) > 1:
        levels[splits[0]] = SPLIT
    for level, found in enumerate(names):
        if levels[level] is None and len(found) == 1 and found[0].casefold() in WRAPPERS:
            levels[level] = ANY
    _mark_outer_folders(levels, names)
    free = [level for level, meaning in enumerate(levels) if meaning is None]
    missing = [meaning for meaning in (CLIENT, CLASS) if meaning not in levels]
    if len(free) <= len(missing):  # a layout without clients has a class only
        for level, meaning in zip(free, missing[len(missing) - len(free) :], strict=True):
            levels[level] = meaning
    return levels


def _all_known(found: Sequence[str], known: Collection[str]) -> bool:
    return bool(known) and {name.casefold() for name in found} <= {name.casefold() for name in known}


def _mark_outer_folders(levels: list[str | None], names: Sequence[Sequence[str]]) -> None:
    """Mark single folders around a split, such as ``chest_xray/train``, and around more levels than have a meaning."""
    for level, found in enumerate(names):
        if levels[level] == ANY:
            continue
        if levels[level] is not None or len(found) > 1:
            return
        inner = [meaning for meaning in levels[level + 1 :] if meaning != ANY]
        is_around_split = SPLIT in inner and all(len(names[other]) == 1 for other in range(levels.index(SPLIT)))
        if not is_around_split and inner.count(None) < 2:
            return
        levels[level] = ANY


def _refuse_partial_splits(layout: FolderLayout, names: Sequence[Sequence[str]], path: str) -> None:
    """Refuse a level that has names of splits beside other names. A class may have the name ``test``."""
    for meaning, found in zip(layout.levels, names, strict=True):
        like_splits = [name for name in found if split_of(name)]
        num_splits = len({split_of(name) for name in like_splits})
        if meaning in (CLIENT, CLASS) and num_splits > (meaning == CLASS) and SPLIT not in layout.levels:
            others = [name for name in found if name not in like_splits]
            shown = f"{', '.join(like_splits)} beside {', '.join(others[:3])}" if others else ", ".join(like_splits)
            raise DataError(
                f"{path} has folders {shown}, which are either splits or names of a {meaning}\n"
                f"  expected  splits only\n  advice    scenario.layout={layout}, if each is a {meaning}"
            )


def _stated_layout(layout: str, depths: Sequence[int]) -> FolderLayout:
    levels = tuple(level.strip() for level in str(layout).strip("/").split("/"))
    are_known = all(level in LEVELS for level in levels) and levels.count(CLASS) <= 1
    are_unique = all(levels.count(level) <= 1 for level in LEVELS[:-1])
    if not (are_known and are_unique and [len(levels)] == list(depths)):
        depth = "different numbers of" if len(depths) > 1 else depths[0]
        expected = f"a level {', '.join(LEVELS)} for each folder, here {depth} levels, separated by /"
        raise SettingError("layout", layout, expected, f"layout={'/'.join(_suggestion(max(depths)))}")
    return FolderLayout(levels=levels)


def _suggestion(depth: int) -> list[str]:
    usual: Mapping[int, list[str]] = {1: [CLASS], 2: [CLIENT, CLASS]}
    return usual.get(depth, [CLIENT, CLASS] + [ANY] * (depth - 2))


def _different_depths(folders: Sequence[tuple[str, ...]], path: str) -> str:
    by_depth = {len(parts): "/".join((*parts, "...")) for parts in folders}
    shown = ", ".join(by_depth[depth] for depth in sorted(by_depth))
    fix = "client/class/1.png for all images, or class/1.png, or train/class/1.png and test/class/1.png"
    return f"{path} has images at different depths: {shown}\n  expected  folders of one depth\n  advice    {fix}"


def split_levels(layout: FolderLayout, folders: Sequence[tuple[str, ...]], path: str) -> list[str]:
    """Return the split of each file.

    Raises:
        DataError: a folder of a stated split level has no usual name of a split.
    """
    splits = [split_of(layout.names(parts, SPLIT)) for parts in folders]
    if None in splits:
        unknown = layout.names(folders[splits.index(None)], SPLIT)
        fix = "another name, or scenario.layout=client/class with the right meaning of the folders"
        raise DataError(
            f"{path} has a folder {unknown} at the level of splits\n"
            f"  expected  train, val, test, or a usual spelling of them\n  advice    {fix}"
        )
    return [split or "" for split in splits]
