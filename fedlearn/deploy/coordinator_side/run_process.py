"""Keep the process id of each run in a file, with signs of life, from which the coordinator sees an interrupted run."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RUNNING_FOLDER = "running"  # in the state folder of the coordinator
ALIVE_INTERVAL_S = 5.0  # seconds between two signs of life


@contextmanager
def process_file(state: Path, run_id: int) -> Iterator[None]:
    """Write the id of this process to a file, touch it at intervals, and remove it at the end of the block.

    Args:
        state: state folder of the coordinator.
        run_id: Flower's id of the run.
    """
    path = _path(state, run_id)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_text(str(os.getpid()), encoding="ascii")
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(ALIVE_INTERVAL_S):
            with suppress(OSError):
                os.utime(path)

    threading.Thread(target=touch, daemon=True, name="sign of life").start()
    try:
        yield
    finally:
        ended.set()
        path.unlink(missing_ok=True)


def read_process(state: Path, run_id: int) -> int | None:
    """Return the process id of a run; None before the run has written it, and after its end."""
    try:
        return int(_path(state, run_id).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def silence_s(state: Path, run_id: int) -> float:
    """Return the seconds since the last sign of life of a run; 0 if it has ended."""
    try:
        return time.time() - _path(state, run_id).stat().st_mtime
    except OSError:
        return 0.0


def known_processes(state: Path) -> set[int]:
    """Return the process ids that runs have written."""
    runs = [int(path.name) for path in (state / RUNNING_FOLDER).glob("*") if path.name.isdecimal()]
    return {process for run_id in runs if (process := read_process(state, run_id)) is not None}


def forget_process(state: Path, run_id: int) -> None:
    """Remove the file of a run."""
    _path(state, run_id).unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Return whether a process runs. A zombie, which waits until its parent notices its end, does not run."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except (OSError, IndexError):  # a system without /proc
        return True


def _path(state: Path, run_id: int) -> Path:
    return state / RUNNING_FOLDER / str(int(run_id))
