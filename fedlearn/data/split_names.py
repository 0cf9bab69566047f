"""Recognize the usual names of splits, in folders, files and columns."""

from __future__ import annotations

import re
from collections.abc import Iterable

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)

_NAMES = {
    TRAIN: "train training trn trainval fit 训练 訓練 entrainement entrenamiento",
    VALIDATION: "val valid validation validate validating dev devel develop development tune tuning 验证 驗證",
    TEST: "test testing tst eval evaluation evaluate holdout heldout 测试 測試",
}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names.split()}
_FILLERS = frozenset(
    (
        "set",
        "sets",
        "data",
        "dataset",
        "split",
        "part",
        "folder",
        "fold",
        "images",
        "image",
        "img",
        "samples",
        "files",
        "集",
    )
)
_GLUED = re.compile(r"(.+?)(?:set|data|集)")


def split_of(name: object) -> str | None:
    """Return ``train``, ``validation`` or ``test`` for a usual name of a split, and None for all other names.

    Upper case, separators, numbers, and words such as *set* or *images* have no effect.

    >>> [split_of(name) for name in ("TRAIN", "test_set", "val2017", "hold-out", "Testset", "north")]
    ['train', 'test', 'validation', 'test', 'test', None]
    """
    parts = [part for part in re.split(r"[\W\d_]+", str(name).casefold()) if part]
    rest = [part for part in parts if part not in _FILLERS]
    joined = "".join(rest)  # "hold out" and "held out" have two parts
    if len(rest) > 2 or (len(rest) == 2 and joined not in ("holdout", "heldout", "trainval")):
        return None
    glued = _GLUED.fullmatch(joined)
    return _SPLIT_OF.get(joined) or (_SPLIT_OF.get(glued[1]) if glued else None)


def are_splits(names: Iterable[object]) -> bool:
    """Return whether all names are names of splits, and there is at least one name."""
    splits = [split_of(name) for name in names]
    return bool(splits) and all(splits)
