"""The run folder: taken by one run only, with the log, and gone again if there was nothing to run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from fedlearn.errors import FedlearnError

CONFIG_FILE, LOG_FILE, LOCK_FILE = "config.yaml", "run.log", ".lock"
RUN_FOLDER_ENTRIES = (CONFIG_FILE, LOG_FILE, "metrics.jsonl", "checkpoints")


class RunFolderError(FedlearnError):
    """A run folder cannot be used."""


class RunFolderWriteError(FedlearnError):
    """A run folder can no longer be written, in the middle of a run."""

    exit_code = 3


@dataclass(frozen=True)
class RunFolderLock:
    """A folder that belongs to this run, and the folders that had to be made for it, innermost first."""

    path: Path
    created_folders: tuple[Path, ...]

    def discard(self) -> None:
        """Leave no trace of a run that never began."""
        for name in (CONFIG_FILE, LOG_FILE, LOCK_FILE):
            with suppress(OSError):
                (self.path / name).unlink()
        for folder in self.created_folders:
            with suppress(OSError):  # not empty: somebody else is at home there by now
                folder.rmdir()


def reserve_run_folder(folder: Path, *, chosen: bool) -> RunFolderLock:
    """Take a folder for one run.

    Args:
        folder: made if absent.
        chosen: by the user, who then wants this one; else the next free name is as good.

    *Guarantees*: of two runs that ask for the same folder at the same moment one gets it.

    Raises:
        FolderError: it cannot be written, or holds a run.
    """
    asked = folder
    for number in count(2):
        made = _missing(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any((folder / name).exists() for name in RUN_FOLDER_ENTRIES):
                (folder / LOG_FILE).open("x").close()
                return RunFolderLock(folder, made)
        except FileExistsError:
            if not folder.is_dir():
                raise RunFolderError(f"{folder} is a file\n  try       hydra.run.dir=DIR") from None
        except OSError as error:
            RunFolderLock(folder, made).discard()
            fix = "hydra.run.dir=DIR, a folder that you may write to"
            raise RunFolderError(f"{folder} cannot be written: {error.strerror}\n  try       {fix}") from error
        if chosen:
            fix = f"python -m simulations.resume {folder}   (or another hydra.run.dir)"
            raise RunFolderError(f"{folder} already holds a run\n  try       {fix}")
        folder = _numbered(asked, number)
    raise AssertionError("count() ends")


def reserve_sweep_folder(folder: Path, *, chosen: bool) -> Path:
    """The folder made for a sweep, whose jobs claim theirs in it; another name if somebody has it who did not ask.

    Raises:
        FolderError: it cannot be made.
    """
    for number in count(2):
        candidate = folder if number == 2 else _numbered(folder, number - 1)
        try:
            candidate.mkdir(parents=True, exist_ok=chosen)
            return candidate
        except FileExistsError:
            if chosen:
                raise RunFolderError(f"{folder} is a file\n  try       hydra.sweep.dir=DIR") from None
        except OSError as error:
            raise RunFolderError(
                f"{folder} cannot be made: {error.strerror}\n  try       hydra.sweep.dir=DIR"
            ) from error
    raise AssertionError("count() ends")


def _numbered(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}_{number}")


def _missing(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in (folder, *folder.parents) if not path.exists())


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Hold a run folder's lock, and send all log lines and warnings to its run.log instead of the terminal.

    Raises:
        FolderError: another process is at work there.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderError(f"{folder} is in use: its run is still going\n  try       again when it is done") from None
    root, handler = logging.getLogger(), logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before, level = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
        handler.close()
        lock.release()
