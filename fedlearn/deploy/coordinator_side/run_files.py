"""Read the run folders of a coordinator: their progress, and the files that a submitter may fetch."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedlearn.deploy.coordinator_side.ownership import DEPLOYMENT_FILE

RUN_FILES = (DEPLOYMENT_FILE, "config.yaml", "metrics.jsonl")  # each of them shows the folder of a run
KEPT_FOLDERS = ("checkpoints",)  # folders that stay at the coordinator
MAX_FILES = 10_000  # files of a run
CHUNK_BYTES = 2**20
RECENT_ROUNDS = 5  # rounds whose mean duration predicts the end
TAIL_BYTES = 2**18  # end of metrics.jsonl that has the recent rounds


class RunFileError(Exception):
    """Report a folder or a file that does not exist, or may not be fetched."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run.

    Attributes:
        name: name of the run; empty if it is unknown.
        round: last complete round; 0 before the first one.
        rounds: planned rounds; None if they are unknown.
        epsilon: privacy loss so far; None without a guarantee.
        seconds_left: predicted seconds to the end; None if they are unknown.
    """

    name: str = ""
    round: int = 0
    rounds: int | None = None
    epsilon: float | None = None
    seconds_left: float | None = None


def find_folder(runs: Path, name: str) -> Path:
    """Return the run folder with a relative path.

    Raises:
        RunFileError: The path leaves the folder of all runs, or is no run folder.
    """
    try:
        folder = (runs / name).resolve()
        is_inside = folder.is_relative_to(runs.resolve()) and folder != runs.resolve()
        is_run = is_inside and (folder / DEPLOYMENT_FILE).is_file()
    except (OSError, ValueError) as error:
        raise RunFileError("no such run folder") from error
    if not is_run:
        raise RunFileError("no such run folder")
    return folder


def list_files(folder: Path) -> list[dict[str, Any]]:
    """Return path, size and SHA-256 digest of each file of a run that a submitter may fetch."""
    return [
        {"path": path, "size": (folder / path).stat().st_size, "sha256": _digest(folder, path)}
        for path in _paths(folder)
    ]


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder has a run, perhaps one that has just started or failed."""
    return any((folder / name).exists() for name in RUN_FILES)


def read_chunks(folder: Path, path: str) -> Iterator[bytes]:
    """Yield a file of a run in parts.

    Args:
        folder: run folder.
        path: path of a file, exactly as `list_files` returns it.

    Raises:
        RunFileError: The path is not in the list of files.
    """
    if path not in _paths(folder):
        raise RunFileError("no such file")
    return _chunks(folder, path)


def read_progress(folder: Path) -> Progress:
    """Return the progress of the run of a folder; unreadable files give an unknown progress."""
    lines = _recent_rounds(folder / "metrics.jsonl")
    last = lines[-1] if lines else {}
    rounds = _planned_rounds(folder)
    seconds = [line["seconds"] for line in lines if isinstance(line.get("seconds"), int | float)]
    number = int(last["round"]) if isinstance(last.get("round"), int) else 0
    left = None
    if rounds is not None and seconds and number < rounds:
        left = (rounds - number) * sum(seconds) / len(seconds)
    epsilon = last.get("epsilon")
    return Progress(
        name=str(_read_json(folder / DEPLOYMENT_FILE).get("id", "")),
        round=number,
        rounds=rounds,
        epsilon=epsilon if isinstance(epsilon, int | float) else None,
        seconds_left=left,
    )


def progress_values(folder: Path) -> dict[str, Any]:
    """Return the progress of a run as JSON values."""
    return asdict(read_progress(folder))


def _paths(folder: Path) -> list[str]:
    """Return the paths of regular files of a run, without links, hidden files, `KEPT_FOLDERS`, and other runs."""
    found = list[str]()
    for place, folders, files in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if name not in KEPT_FOLDERS and not name.startswith("."))
        folders[:] = [name for name in folders if not is_run_folder(Path(place) / name)]
        for name in sorted(files):
            path = Path(place) / name
            if not name.startswith(".") and name != DEPLOYMENT_FILE and stat.S_ISREG(path.lstat().st_mode):
                found.append(path.relative_to(folder).as_posix())
    return found[:MAX_FILES]


def _chunks(folder: Path, path: str) -> Iterator[bytes]:
    with open(os.open(folder / path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _digest(folder: Path, path: str) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(folder, path):
        digest.update(chunk)
    return digest.hexdigest()


def _recent_rounds(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[-RECENT_ROUNDS - 1 :]
        return [line for line in map(_parse, lines) if line]
    except OSError:
        return []


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _planned_rounds(folder: Path) -> int | None:
    try:
        rounds = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")).get("rounds")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    return rounds if type(rounds) is int else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_bytes())
    except OSError:
        return {}
