"""Collect a message in memory, or in a file without a name if it is large.

A process does not need memory for such a file: the system may write its pages to disk, and read them again. The file
disappears with its last view, also after a crash.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from fedlearn.core.tensor_bytes import Buffer

MAX_MEMORY_BYTES = 32 * 2**20  # a message up to this size stays in memory
MIN_FREE_BYTES = 256 * 2**20  # bytes of the disk that stay free
MIN_FREE_SHARE = 0.05  # the same as a share of the disk, for small disks


class TooLarge(Exception):
    """Report a message above the limit of its size."""


class Spool:
    """The bytes of one message.

    Args:
        folder: folder on a disk for large messages; None: the system's folder for temporary files.
        max_bytes: largest number of bytes.
        max_memory_bytes: number of bytes above which the message is in a file.
    """

    def __init__(
        self, folder: Path | None = None, *, max_bytes: int = 2**63, max_memory_bytes: int = MAX_MEMORY_BYTES
    ) -> None:
        self.folder, self.max_bytes, self.max_memory_bytes = folder, max_bytes, max_memory_bytes
        self._memory = bytearray()
        self._file: Any = None
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def write(self, part: Buffer) -> None:
        """Append bytes.

        Raises:
            TooLarge: The message would have more than ``max_bytes``.
            OSError: The disk is almost full.
        """
        if self._size + len(part) > self.max_bytes:
            raise TooLarge(f"the message has more than {self.max_bytes} bytes")
        self._size += len(part)
        if self._file is None and self._size <= self.max_memory_bytes:
            self._memory += part
            return
        if self._file is None:
            self._file = TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            self._write_to_file(memoryview(self._memory))
            self._memory = bytearray()
        self._write_to_file(memoryview(part))

    def view(self, start: int = 0, end: int | None = None) -> memoryview:
        """Return the bytes from ``start`` to ``end``. They may be changed; the changes are visible in this view only.

        Do not write after the first view.
        """
        if self._file is None:
            return memoryview(self._memory)[start:end]
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        whole = mmap.mmap(self._file.fileno(), self._size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return memoryview(whole)[start:end]

    def _write_to_file(self, part: memoryview) -> None:
        disk = os.fstatvfs(self._file.fileno())
        total, free = disk.f_frsize * disk.f_blocks, disk.f_frsize * disk.f_bavail
        if free - len(part) < min(MIN_FREE_BYTES, MIN_FREE_SHARE * total):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while part:
            part = part[self._file.write(part) :]
