"""Prepare the process that runs an experiment: environment variables, threads and memory.

Commands and `fedlearn.run` call this module. The construction of a trainer or an engine does not change the process.
"""

from __future__ import annotations

import ctypes
import os
import sys

from platformdirs import user_cache_path

from fedlearn.core.threads import limit_threads

MALLOC_TRIM_BYTES = 2**30  # glibc keeps up to this amount of freed memory
MALLOC_MMAP_BYTES = 2**25  # glibc returns larger blocks when they are freed; it accepts no larger number
MLFLOW_VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
MALLOC_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}


def set_environment(framework: str | None, num_cores: int | None = None, *, device: str = "cpu") -> None:
    """Prepare this process for a framework, before the framework is loaded. Existing variables keep their values.

    - Flower and MLflow send no telemetry. MLflow prints nothing, and a server that does not respond delays no run.
    - JAX allocates GPU memory as needed, and stores compiled programs in the cache folder of the user.
    - glibc keeps freed memory, see `keep_freed_memory`.
    - torch asks for large pages of memory. A round of a large model then takes a tenth less processor time.
    - Libraries have one thread each, see `fedlearn.core.threads`.
    - On a GPU, torch and JAX multiply in float32, not in TF32. By default, JAX uses it for all products, and torch for
      convolutions only. ``NVIDIA_TF32_OVERRIDE=1`` and ``JAX_DEFAULT_MATMUL_PRECISION=default`` allow TF32.

    Args:
        framework: ``torch``, ``jax`` or ``mixed``; None prepares for no framework.
        num_cores: number of cores of the run, >= 1; None (default) keeps ``FEDLEARN_NUM_CORES``, or all cores.
        device: device of local training, default ``cpu``.
    """
    limit_threads(num_cores)
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    for name, value in MLFLOW_VARIABLES.items():
        os.environ.setdefault(name, value)
    if device != "cpu":
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    if framework in ("jax", "mixed"):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(user_cache_path("fedlearn") / "jax"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if framework in ("torch", "mixed"):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if framework in ("torch", "jax", "mixed"):
        keep_freed_memory(framework)


def keep_freed_memory(framework: str) -> None:
    """Configure glibc to keep freed memory for the next block of clients.

    Otherwise, the kernel clears each page again for each block. In JAX, this takes half of a round of a large model:
    each call of a program allocates all its arrays, in several threads. So JAX keeps arrays of all sizes, in one arena.

    The function has no effect without glibc, or if the user has set ``MALLOC_TRIM_THRESHOLD_`` or
    ``MALLOC_MMAP_THRESHOLD_``.

    Args:
        framework: ``torch``, ``jax`` or ``mixed``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or MALLOC_VARIABLES & os.environ.keys():
        return
    if framework == "jax":
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX: no array has pages of its own
        mallopt(-8, 1)  # M_ARENA_MAX: an arena of a thread has 64 MiB at most
        return
    mallopt(-1, MALLOC_TRIM_BYTES)  # M_TRIM_THRESHOLD
    mallopt(-3, MALLOC_MMAP_BYTES)  # M_MMAP_THRESHOLD
