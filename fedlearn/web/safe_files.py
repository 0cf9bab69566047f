"""Read files below one folder. Links, large files and damaged contents give empty results instead of errors.

The contents may be of another party: a submitter chooses names, and a node chooses reasons.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlearn.core.plain_text import plain_line

MAX_JSON_BYTES = 8 << 20  # larger files are not read
MAX_TEXT = 300  # characters of a text on the page
FLOCK = "FLOCK"  # kind of lock of the run folder lock, in the kernel's list
LOCKS_FILE = Path("/proc/locks")  # Linux: all locks of files, one per line


def open_inside(root: Path, path: Path) -> int | None:
    """Return a descriptor of a regular file below ``root``; None if it is absent, a link, or outside the folder.

    Args:
        root: folder without links in its path, see `pathlib.Path.resolve`.
        path: path of the file.
    """
    try:
        parent = path.parent.resolve(strict=True)
        if not parent.is_relative_to(root):
            return None
        descriptor = os.open(parent / path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return descriptor


def read_bytes(root: Path, path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a file below ``root``; empty if it cannot be read or is larger than ``max_bytes``."""
    descriptor = open_inside(root, path)
    if descriptor is None:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        return b"" if os.fstat(descriptor).st_size > max_bytes else file.read(max_bytes)


def read_object(root: Path, path: Path) -> dict[str, Any]:
    """Return the JSON object in a file below ``root``; empty if there is none."""
    return parse_object(read_bytes(root, path))


def parse_object(text: bytes) -> dict[str, Any]:
    """Return the JSON object in a text; empty for other or damaged contents."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def as_number(value: Any) -> float | None:
    """Return a finite number; None for other values."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_numeric and math.isfinite(value) else None
    except OverflowError:  # a whole number beyond the range of floats
        return None


def as_count(value: Any) -> int:
    """Return a whole number >= 0; 0 for other values."""
    number = as_number(value)
    return max(0, int(number)) if number is not None else 0


def as_text(value: Any) -> str:
    """Return a text as one line of printable characters; empty for other values."""
    return plain_line(value, max_length=MAX_TEXT) if isinstance(value, str) else ""


def as_object(value: Any) -> dict[str, Any]:
    """Return a dictionary; empty for other values."""
    return value if isinstance(value, dict) else {}


def locked_inodes() -> set[int] | None:
    """Return the inodes of all files with a lock of the kind of the run folder lock; None if unknown.

    The list of the kernel is read, because an attempt to take the lock could stop a run that starts at this moment.
    """
    try:
        lines = LOCKS_FILE.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return set(_inodes(lines))


def _inodes(lines: list[str]) -> Iterator[int]:
    for line in lines:
        words = line.split()  # 1: FLOCK ADVISORY WRITE 4711 00:2b:123456 0 EOF
        if FLOCK in words and not words[1].startswith("->"):
            yield from (int(word.rsplit(":", 1)[1]) for word in words if word.count(":") == 2)
