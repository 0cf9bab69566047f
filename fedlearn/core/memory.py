"""Return memory to the operating system."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np


def release_pages(array: np.ndarray) -> None:
    """Return the whole pages of a contiguous array to the kernel, if this is Linux. The array loses its values.

    The array stays valid: a later access gets new pages.
    """
    if sys.platform != "linux":
        return
    start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
