"""Reserve and lock a run folder, write its log, and remove the folder if its run never starts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from fedlearn.advice import command
from fedlearn.callbacks.checkpoints import MODEL_FOLDER
from fedlearn.errors import FedlearnError

CONFIG_FILE, LOG_FILE, LOCK_FILE = "config.yaml", "run.log", ".lock"
HELD_OUT_FILE = "held_out.csv"  # client, file and rows of the held-out rows
DIGESTS_FILE = "data_digests.json"  # digests of the training data
RUN_FOLDER_ENTRIES = (CONFIG_FILE, LOG_FILE, "metrics.jsonl", "checkpoints")


class RunFolderError(FedlearnError):
    """Report a run folder that cannot be used."""


class RunFolderWriteError(FedlearnError):
    """Report a run folder that can no longer be written during a run."""

    exit_code = 3


@dataclass(frozen=True)
class RunFolderLock:
    """Folder that is reserved for one run.

    Args:
        path: run folder.
        created_folders: folders that the reservation created, innermost first.
    """

    path: Path
    created_folders: tuple[Path, ...]

    def discard(self, files: Sequence[str] = ()) -> None:
        """Remove the files and folders of a run that never started.

        Args:
            files: names of further files of the run.
        """
        for name in (CONFIG_FILE, LOG_FILE, LOCK_FILE, DIGESTS_FILE, *files):
            with suppress(OSError):
                (self.path / name).unlink()
        shutil.rmtree(self.path / MODEL_FOLDER, ignore_errors=True)
        for folder in self.created_folders:
            with suppress(OSError):  # not empty: another run uses it now
                folder.rmdir()


def reserve_run_folder(folder: Path, *, chosen: bool) -> RunFolderLock:
    """Reserve a folder for one run.

    Args:
        folder: folder, which is created if absent.
        chosen: True if the user chose this folder. False allows the next free name, with a number at its end.

    *Guarantees*: if two runs reserve the same folder at the same time, only one of them gets it.

    Raises:
        RunFolderError: the folder cannot be written, or already has a run.
    """
    first_choice = folder
    for number in count(2):
        missing = _missing(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any((folder / name).exists() for name in RUN_FOLDER_ENTRIES):
                (folder / LOG_FILE).open("x").close()
                return RunFolderLock(folder, missing)
        except FileExistsError:
            if not folder.is_dir():
                raise RunFolderError(f"{folder} is a file\n  try       hydra.run.dir=outputs/run") from None
        except OSError as error:
            RunFolderLock(folder, missing).discard()
            fix = "hydra.run.dir=outputs/run"
            raise RunFolderError(f"{folder} cannot be written: {error.strerror}\n  try       {fix}") from error
        if chosen:
            fix = command("python -m simulations.resume", folder)
            raise RunFolderError(f"{folder} already holds a run\n  try       {fix}")
        folder = _numbered(first_choice, number)
    raise AssertionError("count() ends")


def reserve_sweep_folder(folder: Path, *, chosen: bool) -> Path:
    """Create the folder of a sweep, in which its jobs reserve their run folders, and return its path.

    Args:
        folder: folder of the sweep.
        chosen: True if the user chose this folder, which may already exist. False gives the next free name.

    Raises:
        RunFolderError: the folder cannot be created.
    """
    for number in count(2):
        candidate = folder if number == 2 else _numbered(folder, number - 1)
        try:
            candidate.mkdir(parents=True, exist_ok=chosen)
            return candidate
        except FileExistsError:
            if chosen:
                raise RunFolderError(f"{folder} is a file\n  try       hydra.sweep.dir=multirun/sweep") from None
        except OSError as error:
            raise RunFolderError(
                f"{folder} cannot be created: {error.strerror}\n  try       hydra.sweep.dir=multirun/sweep"
            ) from error
    raise AssertionError("count() ends")


def free_name(folder: Path) -> Path:
    """Return the folder, or the first name with a number at its end, that does not exist."""
    names = (folder if number == 1 else _numbered(folder, number) for number in count(1))
    return next(path for path in names if not path.exists())


def _numbered(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}_{number}")


def _missing(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in (folder, *folder.parents) if not path.exists())


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Lock a run folder, and write all log lines and warnings to its ``run.log`` instead of the terminal.

    Raises:
        RunFolderError: another process has the lock.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        fix = "again after the end of that run"
        raise RunFolderError(f"{folder} is in use by a run in progress\n  advice    {fix}") from None
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
