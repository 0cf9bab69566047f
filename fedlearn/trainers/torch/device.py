"""Check the device of torch, and limit its threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedlearn.core.threads import THREADS_PER_LIBRARY
from fedlearn.errors import SettingError


def require_device(device: str) -> None:
    """Check that torch can use this device.

    Raises:
        SettingError: The device does not exist.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError("device", device, f"a device of this machine ({reason})", "device=cpu") from error


def device_memory(device: str) -> int | None:
    """Return the memory of a device in bytes; None for a CPU, and for a device that does not report it."""
    if torch.device(device).type == "cpu":
        return None
    try:
        total: int = torch.accelerator.get_memory_info(torch.device(device))[1]
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    return total


@contextmanager
def single_threaded(device: str) -> Iterator[None]:
    """Compute on one thread of this process, then restore the number of threads.

    Models on a CPU are small, and several processes train clients in parallel. A second thread costs more time than it
    saves. Sums would also depend on the number of threads.
    """
    num_threads = torch.get_num_threads()
    if device == "cpu" and num_threads != THREADS_PER_LIBRARY:
        torch.set_num_threads(THREADS_PER_LIBRARY)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
    else:
        yield
