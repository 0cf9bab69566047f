"""Write files that only their owner can read, and that no crash can lose."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlearn.core.tensor_bytes import Buffer


def write_private(path: Path, content: Buffer | str | Sequence[Buffer]) -> None:
    """Replace the content of a file in one step, with mode 0600 for any umask.

    The folder is created with mode 0700 if it is missing.

    Args:
        path: path of the file.
        content: the new content, perhaps in parts.

    *Guarantees*: at the return, the file and its name are on disk. A crash leaves the old file or the new one.

    Raises:
        OSError: The disk is full, or the folder is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            for part in [content] if isinstance(content, Buffer | str) else content:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_private_json(path: Path, values: Any) -> None:
    """Write JSON values with `write_private`."""
    write_private(path, json.dumps(values, indent=1) + "\n")


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
