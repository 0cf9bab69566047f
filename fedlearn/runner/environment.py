"""Settings of the process that runs an experiment: environment variables and memory.

Commands and `fedlearn.run` apply them. Constructing a trainer or an engine changes nothing of the process.
"""

from __future__ import annotations

import ctypes
import os
import sys

from platformdirs import user_cache_path

MALLOC_TRIM_BYTES = 2**30  # freed memory that glibc keeps
MALLOC_MMAP_BYTES = 2**25  # larger blocks are returned when freed; glibc accepts no larger number
MALLOC_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}


def set_environment(framework: str | None) -> None:
    """Prepare this process for a framework, before the framework is loaded. Variables that are set stay.

    - Flower sends no telemetry.
    - JAX takes memory of a GPU as needed, and keeps compiled programs in the user's cache folder.
    - PyTorch: glibc keeps freed memory, see `keep_freed_memory`.

    Args:
        framework: ``torch``, ``jax`` or ``mixed``; None prepares for none.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    if framework in ("jax", "mixed"):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(user_cache_path("fedlearn") / "jax"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if framework in ("torch", "mixed"):
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory. The next block needs it again, and the kernel would clear each page anew.

    Does nothing where the user set ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_``, or without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or MALLOC_VARIABLES & os.environ.keys():
        return
    mallopt(-1, MALLOC_TRIM_BYTES)  # M_TRIM_THRESHOLD
    mallopt(-3, MALLOC_MMAP_BYTES)  # M_MMAP_THRESHOLD
